// Quantized weights times int8 activations: integer dot products within a group, whose order is free, then one fp32
// multiply-add per group, always in the order of K.
//
// Weights of 4 bits are the unsigned operand (0..15), so that AVX2's maddubs never saturates; the offset of 8 comes off
// as 8 * sum(x). Those of 8 bits would overflow its sums of two products: they meet activations of 16 bits in madd,
// which adds two products into 32. VNNI adds four products of bytes into 32 bits and cannot overflow: there weights of 8
// bits are unsigned operands too, w + 128.
#pragma once

namespace quantspec {

// ---- Activations. A block of up to 64 rows holds its codes, then its scales, then its sums; within each, tile by
// tile: codes as dwords of four k [K / 4][tile], or of two where weights of 8 bits meet 16 (`PAIRS`), scales and sums
// [groups][tile].

// Tokens that share each weight, as many as there are registers for: VNNI needs one accumulator for each vector of
// output rows, the others a second one, of 16 bits.
#if defined(__AVX512VNNI__)
constexpr int INT8_TILE = 10;
constexpr bool PAIRS = false;
#else
constexpr int INT8_TILE = 6;
constexpr bool PAIRS = true;
#endif

inline int group_dwords(const Linear& w) { return w.group / (PAIRS && w.format == Q8 ? 2 : 4); }
inline int64_t int8_row_bytes(const Linear& w) { return int64_t(w.groups()) * (group_dwords(w) * 4 + 8); }

struct Int8Block {
  int32_t* codes;
  float* scales;
  int32_t* sums;
  Int8Block(const Linear& w, float* block, int count) {
    codes = reinterpret_cast<int32_t*>(block);
    scales = block + int64_t(count) * w.groups() * group_dwords(w);
    sums = reinterpret_cast<int32_t*>(scales + int64_t(count) * w.groups());
  }
};

inline float lane_max(vf a) {
  alignas(32) float lanes[LANES];
  store(lanes, a);
  float most = lanes[0];
  for (int i = 1; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

template <class T, class V>
inline T lane_sum(V a) {
  alignas(32) T lanes[LANES];
  store(lanes, a);
  T sum = 0;
  for (int i = 0; i < LANES; i++) sum += lanes[i];
  return sum;
}

// Codes round(x / scale) with scale = max|x| / 127 per row and group; a group that is not finite gets a scale that is
// not a number, so that the fault shows in the output. `x` has room for whole groups.
inline void quantize_row(const Linear& w, int n, int row, float* x, float* inputs) {
  const int base = row / BLOCK_ROWS * BLOCK_ROWS, count = n - base < BLOCK_ROWS ? n - base : BLOCK_ROWS;
  const Int8Block block(w, inputs + int8_row_bytes(w) / 4 * base, count);
  const Tiles tiles(count, INT8_TILE);
  const int tile = tiles.of(row - base), begin = tiles.begin(tile), width = tiles.size(tile);
  const int groups = w.groups(), group = w.group, column = row - base - begin;
  int32_t* codes = block.codes + int64_t(begin) * groups * group_dwords(w) + column;
  float* scales = block.scales + begin * groups + column;
  int32_t* sums = block.sums + begin * groups + column;
  std::memset(x + w.cols, 0, sizeof(float) * (groups * group - w.cols));
  for (int g = 0; g < groups; g++, x += group) {
    vf most = set1(0.0f), fault = set1(0.0f);
    for (int k = 0; k < group; k += LANES) {
      const vf value = load(x + k);
      most = max(most, abs(value));
      fault = fma(value, set1(0.0f), fault);  // stays 0 unless something is infinite or not a number
    }
    const float peak = lane_max(most), scale = peak / 127.0f;
    const bool finite = lane_sum<float>(fault) == 0;
    // Of a group whose scale would be a subnormal number nothing is left.
    const float inverse = finite && scale >= 1.2e-38f ? 1.0f / scale : 0.0f;
    vi total = set1(0);
    for (int k = 0; k < group; k += LANES) {
      const vi code = inverse == 0 ? set1(0) : to_int(mul(load(x + k), set1(inverse)));
      total = add(total, code);
      if (PAIRS && w.format == Q8) {
        store_pairs(code, codes, width);
        codes += 4 * width;
      } else {
        store_bytes(code, codes, codes + width);
        codes += 2 * width;
      }
    }
    scales[g * width] = finite ? (inverse == 0 ? 0.0f : scale) : NAN;
    sums[g * width] = lane_sum<int32_t>(total);
  }
}

// ---- Integer dot products. A `Dot` multiplies a vector of weights (4 nibbles in each 32-bit lane, one lane an output
// row) by four activations: `mul` starts a partial sum, `mac` adds to it up to seven times, `flush` adds it to the
// 32-bit sums. `pairs` are two weights of 8 bits in each lane, which `mac_pairs` multiplies by two activations. With
// VNNI `mac` adds to the 32-bit sums at once, and `quads` are four weights of 8 bits in each lane.

#if defined(__AVX512BW__)
struct Dot {
  using V = __m512i;
  static constexpr int rows = 16;
  static V load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static V low(V v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static V high(V v) { return low(_mm512_srli_epi16(v, 4)); }
  static V broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static V zero() { return _mm512_setzero_si512(); }
#if defined(__AVX512VNNI__)
  static V mac(V sum, V w, V x) {  // _mm512_dpbusd_epi32, around which GCC 12 copies the sums, and then spills them
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
  // Two steps of two k each, 32 output rows: w + 128 in four of them a lane. Lanes come in the order of the unpacking,
  // 0-3, 8-11, 16-19, 24-27 and then the others, which `in_order` undoes.
  static void quads(const uint8_t* p, V (&weights)[2]) {
    const V origin = _mm512_set1_epi8(-128), first = load(p), second = load(p + 64);
    weights[0] = _mm512_xor_si512(_mm512_unpacklo_epi16(first, second), origin);
    weights[1] = _mm512_xor_si512(_mm512_unpackhi_epi16(first, second), origin);
  }
  static void in_order(V& a, V& b) {
    const V low = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
    b = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
    a = low;
  }
#else
  static V pairs(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V mac_pairs(V total, V w, V x) { return _mm512_add_epi32(total, _mm512_madd_epi16(w, x)); }
  static V mul(V w, V x) { return _mm512_maddubs_epi16(w, x); }
  static V mac(V sum, V w, V x) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x)); }
  static V flush(V total, V sum) { return _mm512_add_epi32(total, _mm512_madd_epi16(sum, _mm512_set1_epi16(1))); }
#endif
  static V zeros(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V without(V total, V zeros, int32_t sum) {
    return _mm512_sub_epi32(total, _mm512_mullo_epi32(zeros, broadcast(sum)));
  }
  using F = __m512;
  static F scales(int type, const uint8_t* group, int row) {
    if (type == F32) return _mm512_loadu_ps(group + row * 4);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + row * 2));
    if (type == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void add_to(float* out, V total, F scales, float scale) {
    const F product = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
    _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), product, _mm512_loadu_ps(out)));
  }
};
#elif defined(QS_AVX2)
struct Dot {
  using V = __m256i;
  static constexpr int rows = 8;
  static V load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
  static V low(V v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static V high(V v) { return low(_mm256_srli_epi16(v, 4)); }
  static V broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static V zero() { return _mm256_setzero_si256(); }
  static V pairs(const uint8_t* p) { return load_pairs(p); }
  static V mac_pairs(V total, V w, V x) { return in_turn(_mm256_add_epi32(total, _mm256_madd_epi16(w, x))); }
  static V mul(V w, V x) { return _mm256_maddubs_epi16(w, x); }
  static V mac(V sum, V w, V x) { return in_turn(_mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x))); }
  static V in_turn(V sum) {
    asm("" : "+x"(sum));  // GCC would reorder the additions into a tree, run out of registers and spill
    return sum;
  }
  static V flush(V total, V sum) { return _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1))); }
  static V zeros(const uint8_t* p) { return load_u8(p); }
  static V without(V total, V zeros, int32_t sum) { return sub(total, quantspec::mul(zeros, set1(sum))); }
  using F = vf;
  static F scales(int type, const uint8_t* group, int row) { return load_as(type, group, row); }
  static void add_to(float* out, V total, F scales, float scale) {
    store(out, fma(to_float(total), quantspec::mul(scales, set1(scale)), quantspec::load(out)));
  }
};
#else
struct Dot {
  using V = vi;
  static constexpr int rows = 8;
  static V load(const uint8_t* p) { return quantspec::load(reinterpret_cast<const int32_t*>(p)); }
  static V low(V v) { return bit_and(v, set1(0x0f0f0f0f)); }
  static V high(V v) { return low(shift_right(v, 4)); }
  static V broadcast(int32_t x) { return set1(x); }
  static V zero() { return set1(0); }
  static V pairs(const uint8_t* p) { return load_pairs(p); }
  static V mac_pairs(V total, V w, V x) {
    for (int i = 0; i < LANES; i++) {
      total.at[i] += int16_t(w.at[i]) * int16_t(x.at[i]) + (w.at[i] >> 16) * (x.at[i] >> 16);
    }
    return total;
  }
  static V mul(V w, V x) { return mac(zero(), w, x); }
  static V mac(V sum, V w, V x) {
    for (int j = 0; j < 32; j += 8) {
      for (int i = 0; i < LANES; i++) sum.at[i] += uint8_t(w.at[i] >> j) * int8_t(x.at[i] >> j);
    }
    return sum;
  }
  static V flush(V total, V sum) { return add(total, sum); }
  static V zeros(const uint8_t* p) { return load_u8(p); }
  static V without(V total, V zeros, int32_t sum) { return sub(total, quantspec::mul(zeros, set1(sum))); }
  using F = vf;
  static F scales(int type, const uint8_t* group, int row) { return load_as(type, group, row); }
  static void add_to(float* out, V total, F scales, float scale) {
    store(out, fma(to_float(total), quantspec::mul(scales, set1(scale)), quantspec::load(out)));
  }
};
#endif

#if defined(__AVX512VNNI__)

// Adds a group of weights, for 32 output rows and T tokens. `ahead` advances by `stride` for each cache line or two:
// what later steps will read.
template <int R, int T, bool EIGHT>
inline void dot_group(const uint8_t* codes, int steps, const int32_t* x, Dot::V (&total)[R][T], const char*& ahead,
                      int stride) {
  static_assert(R == 2, "a vector has 16 output rows");
  for (int step = 0; step < steps; step++) {
    QS_UNROLL(2)
    for (int half = 0; half < 2; half++) {
      if (EIGHT || half == 0) {
        prefetch(ahead);
        prefetch(ahead + 64);
        ahead += stride;
      }
      Dot::V weights[2];
      if (EIGHT) {
        Dot::quads(codes + half * 128, weights);
      } else {
        for (int r = 0; r < 2; r++) {
          const Dot::V both = Dot::load(codes + r * 64);
          weights[r] = half ? Dot::high(both) : Dot::low(both);
        }
      }
      for (int t = 0; t < T; t++) {
        const Dot::V token = Dot::broadcast(x[half * T + t]);
        for (int r = 0; r < 2; r++) total[r][t] = Dot::mac(total[r][t], weights[r], token);
      }
    }
    codes += EIGHT ? 256 : 128;
    x += 2 * T;
  }
  for (int t = 0; EIGHT && t < T; t++) Dot::in_order(total[0][t], total[1][t]);
}

#else

// Adds a group of 4-bit weights, for R vectors of output rows and T tokens. `ahead` advances by `stride` a step: what
// later steps will read.
template <int R, int T>
inline void dot_nibbles(const uint8_t* codes, int steps, const int32_t* x, Dot::V (&total)[R][T], const char*& ahead,
                        int stride) {
  using V = Dot::V;
  constexpr int bytes = Dot::rows * 4;
  for (int step = 0; step < steps; step += 4) {
    V sum[R][T];
    QS_UNROLL(4)
    for (int s = 0; s < 4; s++) {
      prefetch(ahead);
      if (R * Dot::rows == 32) prefetch(ahead + 64);
      ahead += stride;
      QS_UNROLL(2)
      for (int half = 0; half < 2; half++) {
        V weights[R];
        for (int r = 0; r < R; r++) {
          const V both = Dot::load(codes + s * 128 + r * bytes);
          weights[r] = half ? Dot::high(both) : Dot::low(both);
        }
        for (int t = 0; t < T; t++) {
          const V token = Dot::broadcast(x[(2 * s + half) * T + t]);
          for (int r = 0; r < R; r++) {
            sum[r][t] = s + half == 0 ? Dot::mul(weights[r], token) : Dot::mac(sum[r][t], weights[r], token);
          }
        }
      }
    }
    for (int r = 0; r < R; r++) {
      for (int t = 0; t < T; t++) total[r][t] = Dot::flush(total[r][t], sum[r][t]);
    }
    codes += 4 * 128;
    x += 8 * T;
  }
}

// The same of 8-bit weights.
template <int R, int T>
inline void dot_pairs(const uint8_t* codes, int steps, const int32_t* x, Dot::V (&total)[R][T], const char*& ahead,
                      int stride) {
  for (int step = 0; step < steps; step++) {
    QS_UNROLL(4)
    for (int s = 0; s < 4; s++) {
      if (s % 2 == 0) {
        prefetch(ahead);
        if (R * Dot::rows == 32) prefetch(ahead + 64);
        ahead += stride;
      }
      Dot::V weights[R];
      for (int r = 0; r < R; r++) weights[r] = Dot::pairs(codes + s * 64 + r * Dot::rows * 2);
      for (int t = 0; t < T; t++) {
        const Dot::V token = Dot::broadcast(x[s * T + t]);
        for (int r = 0; r < R; r++) total[r][t] = Dot::mac_pairs(total[r][t], weights[r], token);
      }
    }
    codes += 256;
    x += 4 * T;
  }
}

template <int R, int T, bool EIGHT>
inline void dot_group(const uint8_t* codes, int steps, const int32_t* x, Dot::V (&total)[R][T], const char*& ahead,
                      int stride) {
  if (EIGHT) {
    dot_pairs<R, T>(codes, steps, x, total, ahead, stride);
  } else {
    dot_nibbles<R, T>(codes, steps, x, total, ahead, stride);
  }
}

#endif

// Vectors of output rows that a tile of T tokens takes together, as many as there are registers for.
constexpr int vectors(int T) { return T <= 2 || Dot::rows == 16 ? 32 / Dot::rows : 2; }

// Some groups of one panel, output rows from `row` on, against one tile of tokens.
struct Int8Tile {
  const uint8_t* panel;  // the first of the groups
  int row, groups;
  const int32_t* x;
  const float* scales;
  const int32_t* sums;
  const char* ahead;
  int stride;
};

template <int T, bool EIGHT, bool ASYMMETRIC>
void int8_tile(const Linear& w, const Int8Tile& first, float* out) {
  Int8Tile tile = first;  // by reference: passed by value it goes through memory, and stalls each call
  using V = Dot::V;
  constexpr int R = vectors(T);
  constexpr bool SIGNED = EIGHT && PAIRS;
  // Copies, since the compiler must assume that a store of floats could change the fields behind a reference.
  const int steps = w.group / 8, scale_type = w.scale_type;
  const int64_t group_bytes = w.group_bytes(), codes_offset = w.codes_offset() + tile.row * (EIGHT ? 2 : 4);
  const int64_t zeros_offset = w.scale_bytes() + tile.row;
  out += tile.row;
  for (int g = 0; g < tile.groups; g++) {
    V total[R][T];
    for (int t = 0; t < T; t++) {
      // What the codes' and the zero points' origins differ by.
      constexpr int origin = SIGNED ? 128 : EIGHT ? -128 : -8;
      const V start = SIGNED == ASYMMETRIC ? Dot::broadcast(origin * tile.sums[t]) : Dot::zero();
      for (int r = 0; r < R; r++) total[r][t] = start;
    }
    dot_group<R, T, EIGHT>(tile.panel + codes_offset, steps, tile.x, total, tile.ahead, tile.stride);
    for (int r = 0; r < R; r++) {
      const Dot::F scales = Dot::scales(scale_type, tile.panel, tile.row + r * Dot::rows);
      for (int t = 0; t < T; t++) {
        if (ASYMMETRIC) {
          total[r][t] = Dot::without(total[r][t], Dot::zeros(tile.panel + zeros_offset + r * Dot::rows), tile.sums[t]);
        }
        Dot::add_to(out + t * 32 + r * Dot::rows, total[r][t], scales, tile.scales[t]);
      }
    }
    tile.panel += group_bytes;
    tile.x += steps * (EIGHT && PAIRS ? 4 : 2) * T;
    tile.scales += T;
    tile.sums += T;
  }
}

using Int8Kernel = void (*)(const Linear&, const Int8Tile&, float*);

template <int T>
inline Int8Kernel int8_kernel(const Linear& w) {
  if (w.format == Q8) return w.asymmetric ? int8_tile<T, true, true> : int8_tile<T, true, false>;
  return w.asymmetric ? int8_tile<T, false, true> : int8_tile<T, false, false>;
}

inline Int8Kernel int8_kernel(const Linear& w, int width) {
  switch (width) {
    case 1: return int8_kernel<1>(w);
    case 2: return int8_kernel<2>(w);
    case 3: return int8_kernel<3>(w);
    case 4: return int8_kernel<4>(w);
    case 5: return int8_kernel<5>(w);
    case 6: return int8_kernel<6>(w);
#if defined(__AVX512VNNI__)
    case 7: return int8_kernel<7>(w);
    case 8: return int8_kernel<8>(w);
    case 9: return int8_kernel<9>(w);
    case 10: return int8_kernel<10>(w);
#endif
  }
  std::abort();
}

// Eight groups of 128, with their scales, which take half of a first-level cache of 32 KB; the tokens' codes need the
// other half. A single tile takes four, so that the next block, which soon follows, has room too.
constexpr int64_t BLOCK_BYTES = 16384 + 1024;

// Sums [count, 32] of one panel. Groups go in blocks that fit into the first-level cache; the next block is fetched
// meanwhile.
inline void panel_int8(const Linear& w, int panel, float* inputs, int count, float* sums) {
  const Int8Block block(w, inputs, count);
  const Tiles tiles(count, INT8_TILE);
  const int groups = w.groups();
  const int64_t group_bytes = w.group_bytes();
  const bool once = tiles.count == 1 && vectors(count) * Dot::rows == 32;  // each weight is read once
  const int64_t block_bytes = tiles.count == 1 ? BLOCK_BYTES / 2 : BLOCK_BYTES;
  const int fitting = once ? groups : int(block_bytes / group_bytes), blocks = (groups + fitting - 1) / fitting;
  const int together = (groups + blocks - 1) / blocks;
  const uint8_t* start = w.panels + panel * w.panel_bytes();
  std::memset(sums, 0, sizeof(float) * 32 * count);
  for (int g = 0; g < groups; g += together, start += together * group_bytes) {
    const int now = groups - g < together ? groups - g : together;
    for (int t = 0; t < tiles.count; t++) {
      const int begin = tiles.begin(t), width = tiles.size(t), span = vectors(width) * Dot::rows;
      const int64_t at = int64_t(begin) * groups + int64_t(g) * width;
      const char* next = reinterpret_cast<const char*>(start + now * group_bytes);
      Int8Tile tile{start, 0, now, block.codes + at * group_dwords(w), block.scales + at, block.sums + at, next, 0};
      if (once) tile.ahead = reinterpret_cast<const char*>(start) + 4096, tile.stride = 128;
      const Int8Kernel kernel = int8_kernel(w, width);
      for (; tile.row < 32; tile.row += span) {
        // The first tile's passes over a block, two of them where the registers hold half a panel, fetch the next one.
        if (!once && t == 0) tile.ahead = next + now * group_bytes * tile.row / 32, tile.stride = 128 * span / 32;
        kernel(w, tile, sums + begin * 32);
      }
    }
  }
}

}  // namespace quantspec
