// Weights of any format times fp32 activations, every output one chain of fused multiply-adds in the order of K (per
// group, with the groups added in order, where there are scales).
#pragma once

namespace quantspec {

#if defined(QS_AVX2)
constexpr int FLOAT_TILE = 6;
#else
constexpr int FLOAT_TILE = 2;
#endif

// Inputs of a block of up to 64 rows lie tile by tile, [K][tile]; K is filled up to whole groups.
inline int64_t float_row_values(const Linear& w) { return w.dense() ? w.cols : int64_t(w.groups()) * w.group; }

inline void spread_row(const Linear& w, int n, int row, const float* x, float* inputs) {
  const int base = row / BLOCK_ROWS * BLOCK_ROWS, count = n - base < BLOCK_ROWS ? n - base : BLOCK_ROWS;
  const Tiles tiles(count, FLOAT_TILE);
  const int tile = tiles.of(row - base), begin = tiles.begin(tile), width = tiles.size(tile);
  const int64_t values = float_row_values(w);
  float* out = inputs + values * (base + begin) + (row - base - begin);
  for (int k = 0; k < w.cols; k++) out[int64_t(k) * width] = x[k];
  for (int64_t k = w.cols; k < values; k++) out[k * width] = 0.0f;
}

template <int R, int T>
inline void fma_column(const vf (&weights)[R], const float* x, vf (&sum)[R][T]) {
  for (int t = 0; t < T; t++) {
    const vf token = set1(x[t]);
    for (int r = 0; r < R; r++) sum[r][t] = fma(weights[r], token, sum[r][t]);
  }
}

template <int R, int T>
inline void load_sums(const float* out, vf (&sum)[R][T]) {
  for (int r = 0; r < R; r++) {
    for (int t = 0; t < T; t++) sum[r][t] = load(out + t * 32 + r * LANES);
  }
}

template <int R, int T>
inline void store_sums(float* out, const vf (&sum)[R][T]) {
  for (int r = 0; r < R; r++) {
    for (int t = 0; t < T; t++) store(out + t * 32 + r * LANES, sum[r][t]);
  }
}

template <int R, int T, int TYPE>
void dense_tile(const uint8_t* weights, int count, const float* x, float* out) {
  constexpr int bytes = TYPE == F32 ? 4 : 2;
  vf sum[R][T];
  load_sums(out, sum);
  for (int k = 0; k < count; k++) {
    prefetch(weights + 1024);
    vf column[R];
    for (int r = 0; r < R; r++) column[r] = load_as(TYPE, weights + r * LANES * bytes, 0);
    fma_column(column, x, sum);
    weights += 32 * bytes;
    x += T;
  }
  store_sums(out, sum);
}

// Codes of k = j, of the 8 in a step, for the eight rows from `row` on.
template <bool EIGHT>
inline vi codes_of(const uint8_t* step, int row, int j) {
  if (EIGHT) {
    const vi pair = load_pairs(step + j / 2 * 64 + row * 2);
    return shift_right_signed(j % 2 ? pair : shift_left(pair, 16), 16);
  }
  const int shift = j < 4 ? 8 * j : 8 * j - 28;  // where it lies in the 32 bits of a row
  return bit_and(shift_right(load(reinterpret_cast<const int32_t*>(step + row * 4)), shift), set1(15));
}

template <int R, int T, bool EIGHT>
void affine_tile(const Linear& w, const uint8_t* panel, int row, int groups, const float* x, float* out) {
  const int steps = w.group / 8;
  for (int g = 0; g < groups; g++) {
    const uint8_t* codes = panel + w.codes_offset();
    vf offset[R], sum[R][T];
    for (int r = 0; r < R; r++) {
      const int at = row + r * LANES;
      const vi zero = w.asymmetric ? load_u8(panel + w.scale_bytes() + at) : set1(EIGHT ? 128 : 8);
      offset[r] = to_float(EIGHT ? sub(zero, set1(128)) : zero);
      for (int t = 0; t < T; t++) sum[r][t] = set1(0.0f);
    }
    for (int s = 0; s < steps; s++) {
      prefetch(codes + 1024);
      for (int j = 0; j < 8; j++) {
        vf column[R];
        for (int r = 0; r < R; r++) column[r] = sub(to_float(codes_of<EIGHT>(codes, row + r * LANES, j)), offset[r]);
        fma_column(column, x + j * T, sum);
      }
      codes += EIGHT ? 256 : 128;
      x += 8 * T;
    }
    for (int r = 0; r < R; r++) {
      const vf scale = load_as(w.scale_type, panel, row + r * LANES);
      for (int t = 0; t < T; t++) {
        float* y = out + t * 32 + r * LANES;
        store(y, fma(sum[r][t], scale, load(y)));
      }
    }
    panel += w.group_bytes();
  }
}

// One tile of `count` columns (dense) or groups (quantized) from `weights` on.
template <int T>
void float_tile(const Linear& w, const uint8_t* weights, int count, const float* x, float* out) {
  constexpr int R = T == 1 ? 4 : 2;
  for (int row = 0; row < 32; row += R * LANES) {
    if (w.format == F32) dense_tile<R, T, F32>(weights + row * 4, count, x, out + row);
    if (w.format == F16) dense_tile<R, T, F16>(weights + row * 2, count, x, out + row);
    if (w.format == BF16) dense_tile<R, T, BF16>(weights + row * 2, count, x, out + row);
    if (w.format == Q4) affine_tile<R, T, false>(w, weights, row, count, x, out + row);
    if (w.format == Q8) affine_tile<R, T, true>(w, weights, row, count, x, out + row);
  }
}

inline void panel_float(const Linear& w, int panel, const float* inputs, int count, float* sums) {
  const Tiles tiles(count, FLOAT_TILE);
  const int units = w.dense() ? w.cols : w.groups(), width_of_unit = w.dense() ? 1 : w.group;
  const int64_t unit_bytes = w.panel_bytes() / units, values = float_row_values(w);
  const int together = 16384 / unit_bytes > 0 ? int(16384 / unit_bytes) : 1;
  const uint8_t* weights = w.panels + panel * w.panel_bytes();
  std::memset(sums, 0, sizeof(float) * 32 * count);
  for (int unit = 0; unit < units; unit += together) {
    const int now = units - unit < together ? units - unit : together;
    for (int t = 0; t < tiles.count; t++) {
      const int begin = tiles.begin(t), width = tiles.size(t);
      const float* x = inputs + values * begin + int64_t(unit) * width_of_unit * width;
      const uint8_t* start = weights + unit * unit_bytes;
      float* out = sums + begin * 32;
      switch (width) {
        case 1: float_tile<1>(w, start, now, x, out); break;
        case 2: float_tile<2>(w, start, now, x, out); break;
#if defined(QS_AVX2)
        case 3: float_tile<3>(w, start, now, x, out); break;
        case 4: float_tile<4>(w, start, now, x, out); break;
        case 5: float_tile<5>(w, start, now, x, out); break;
        case 6: float_tile<6>(w, start, now, x, out); break;
#endif
      }
    }
  }
}

}  // namespace quantspec
