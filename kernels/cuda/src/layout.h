// Where everything lies: packed weights, a stage of shared memory, fragments, and the split of the work over blocks.
//
// A weight [N, K] of 4-bit codes is cut into tiles of 256 rows x 128 k (8-bit codes: 64 k), both filled up. Every group
// of 32, 64 or 128 k of a row has a scale and, where the weight is asymmetric, a zero point. Tiles follow each other
// along k first; each is one contiguous piece:
//
//   codes, 16384 bytes: [warp 8][chunk of 32 k][part][lane 32], 16 bytes each
//   scales:             [group][warp 8][g 8][slot 4], 2 or 4 bytes each
//   zero points:        [group][warp 8][g 8][slot 4], a byte each
//
// A warp owns 32 rows: slot s, lane group g is row 8 s + g. Lane 4 g + t holds rows of lane group g and, of every
// chunk, the eight k from 8 t on. With 4 bits there is one part, a word for each slot; with 8 bits two, with two words
// for each of two slots. Eight k in a row make four pairs, a register each: pairs 0 and 1 are a lane's k in one
// m16n8k16, 2 and 3 in the next. Which k meet in a step is free, as weights and tokens agree on it; so nothing is
// shuffled, and tokens are read in their natural order, eight k at a time. Nibble i of a 4-bit word is k = [0, 2, 4, 6,
// 1, 3, 5, 7][i], stored as q + 8: one mask leaves a pair, its halves 16 bits apart. 8-bit codes are stored as q + 128
// in order of k. Zero points are stored like codes.
#pragma once

#ifdef __CUDACC__
#define QS_BOTH __host__ __device__
#else
#define QS_BOTH
#endif

namespace quantspec {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int WARP_ROWS = 32;
constexpr int TILE_ROWS = WARPS * WARP_ROWS;
constexpr int CODE_BYTES = 16384;
constexpr int RESERVED = 128;  // shared memory behind the stages: their barriers, and a flag

struct Params {  // mirrored in packed.py
  const uint8_t* weights;
  const void* x;               // [n, cols], rows aligned to 16 bytes
  void* y;                     // [n, rows]
  const float* bias;           // [rows], or null
  float* workspace;            // partial sums: two slots for each block
  int32_t* arrivals;           // [row_blocks], zero before and after
  int64_t x_stride, y_stride;  // values between rows
  int32_t n, rows;
  int32_t cols;  // K, a multiple of 8
  int32_t row_blocks, k_tiles;
  int32_t bfloat_scales;  // scales of 2 bytes: else half
  int32_t float_y;        // else the type of x
};

// How weights are stored: bits of a code, k of a group (no more than a tile's), zero points or none, bytes of a scale.
template <int BITS_, int GROUP, bool ZEROS_, int SCALE_BYTES_>
struct Weights {
  static constexpr int BITS = BITS_, SCALE_BYTES = SCALE_BYTES_;
  static constexpr bool ZEROS = ZEROS_;
  static constexpr int TILE_K = CODE_BYTES * 8 / (TILE_ROWS * BITS);
  static constexpr int CHUNKS = TILE_K / 32;
  static constexpr int PARTS = BITS / 4;
  static constexpr int GROUPS = TILE_K / GROUP;  // in a tile
  static constexpr int GROUP_CHUNKS = GROUP / 32;
  static constexpr int SCALES_END = CODE_BYTES + GROUPS * TILE_ROWS * SCALE_BYTES;
  static constexpr int TILE_BYTES = SCALES_END + (ZEROS ? GROUPS * TILE_ROWS : 0);
  static_assert(GROUPS * GROUP_CHUNKS == CHUNKS && (SCALE_BYTES == 2 || SCALE_BYTES == 4));
};

// What depends on the tokens too, in columns of 8, and on the bytes of shared memory.
template <class W, int COLUMNS_, int MEMORY>
struct Shape : W {
  static constexpr int COLUMNS = COLUMNS_;
  static constexpr int TOKENS = 8 * COLUMNS;
  static constexpr int TOKEN_BYTES = W::TILE_K * 2;
  // 64 bytes more than a multiple of 128: eight lanes that read two tokens' 64 bytes each meet no bank twice.
  static constexpr int TOKEN_STRIDE = TOKEN_BYTES + 64;
  static constexpr int STAGE_BYTES = W::TILE_BYTES + TOKENS * TOKEN_STRIDE;
  static constexpr int FITTING = (MEMORY - RESERVED) / STAGE_BYTES;
  static constexpr int STAGES = FITTING < 8 ? FITTING : 8;
  static_assert(STAGES >= 2, "one tile is copied while another is used");
};

template <class S>
QS_BOTH constexpr int code_vector(int warp, int chunk, int part, int lane) {  // in units of 16 bytes
  return ((warp * S::CHUNKS + chunk) * S::PARTS + part) * 32 + lane;
}

// Of the first of four slots.
template <class S>
QS_BOTH constexpr int scale_offset(int group, int warp, int lane) {
  return CODE_BYTES + ((group * WARPS + warp) * 8 + lane / 4) * 4 * S::SCALE_BYTES;
}

template <class S>
QS_BOTH constexpr int zero_offset(int group, int warp, int lane) {
  return S::SCALES_END + ((group * WARPS + warp) * 8 + lane / 4) * 4;
}

template <class S>
QS_BOTH constexpr int token_offset(int column, int chunk, int lane) {
  return S::TILE_BYTES + (column * 8 + lane / 4) * S::TOKEN_STRIDE + chunk * 64 + lane % 4 * 16;
}

// Accumulator c of a lane, as m16n8k16 leaves it: row of the 16, token of the 8.
QS_BOTH constexpr int accumulator_row(int lane, int c) { return lane / 4 + c / 2 * 8; }
QS_BOTH constexpr int accumulator_token(int lane, int c) { return lane % 4 * 2 + c % 2; }

// The tiles, in order, are cut into equal runs, a block each. The cut depends on the matrix and the number of blocks
// alone, never on n, so that a row's sums are formed in the same order at every width.
struct Split {
  int tiles, blocks;  // blocks <= tiles, so that none is empty

  QS_BOTH constexpr int first(int block) const { return int(int64_t(tiles) * block / blocks); }
  QS_BOTH constexpr int block_of(int tile) const { return int(((int64_t(tile) + 1) * blocks - 1) / tiles); }
};

// Where a block leaves its part of a row block that it shares: it shares two at most, the first and the last it
// touches.
QS_BOTH constexpr int workspace_slot(const Split& split, int k_tiles, int block, int row_block) {
  return 2 * block + (split.first(block) / k_tiles != row_block);
}

}  // namespace quantspec
