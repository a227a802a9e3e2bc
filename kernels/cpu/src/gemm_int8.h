// Quantized weights times int8 activations: integer dot products within a group (dot_int8.h), whose order is free, then
// one fp32 multiply-add per group, always in the order of K.
#pragma once

#include "dot_int8.h"

namespace quantspec {

// ---- Activations. A block of up to 64 rows holds its codes, then its scales, then its sums; within each, tile by
// tile: codes as dwords of four k [K / 4][tile], or of two where weights of 8 bits meet 16 (`PAIRS`), scales and sums
// [groups][tile].

// Tokens that share each weight, as many as there are registers for: VNNI needs one accumulator for each vector of
// output rows, the others a second one, of 16 bits. Several tiles of more than 10 tokens would not stay in the
// first-level cache beside a block of 4-bit weights.
#if defined(__AVX512VNNI__)
constexpr int INT8_TILE = 14, INT8_TILE_OF_MANY = 10;
constexpr bool PAIRS = false;
#else
constexpr int INT8_TILE = 6, INT8_TILE_OF_MANY = 6;
constexpr bool PAIRS = true;
#endif

inline Tiles int8_tiles(const Linear& w, int count) {
  return Tiles(count, w.format == Q8 || count <= INT8_TILE ? INT8_TILE : INT8_TILE_OF_MANY);
}

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
  const Tiles tiles = int8_tiles(w, count);
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
inline Int8Kernel int8_kernel_of(const Linear& w) {
  if (w.format == Q8) return w.asymmetric ? int8_tile<T, true, true> : int8_tile<T, true, false>;
  return w.asymmetric ? int8_tile<T, false, true> : int8_tile<T, false, false>;
}

template <int T = INT8_TILE>
inline Int8Kernel int8_kernel(const Linear& w, int width) {
  if constexpr (T == 0) {
    std::abort();
  } else {
    return width == T ? int8_kernel_of<T>(w) : int8_kernel<T - 1>(w, width);
  }
}

// Eight groups of 128, with their scales, which take half of a first-level cache of 32 KB; the tokens' codes need the
// other half. A single tile takes four, so that the next block, which soon follows, has room too.
constexpr int64_t BLOCK_BYTES = 16384 + 1024;

// Sums [count, 32] of one panel. Groups go in blocks that fit into the first-level cache; the next block is fetched
// meanwhile.
inline void panel_int8(const Linear& w, int panel, float* inputs, int count, float* sums) {
  const Int8Block block(w, inputs, count);
  const Tiles tiles = int8_tiles(w, count);
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
