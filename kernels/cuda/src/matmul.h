// y[n, N] = x[n, K] W^T + bias for n <= 64, W in 4 or 8 bits: what one block of threads does.
//
// Weights take the 16-row side of m16n8k16 and tokens the 8-column side, so that up to eight rows of x cost one column.
// Codes less zero points are exact integers; the sum over a group is scaled in fp32 once. A block walks its run of
// tiles; where row blocks are shared, partial sums go to the workspace and the block that comes last adds them in order
// of block. So a row of y has the same bits at every n.
#pragma once

#include "layout.h"
#include "ring.h"
#include "types.h"

namespace quantspec {

template <class S>
using Sums = float[2][S::COLUMNS][4];  // two times 16 rows, columns of 8 tokens, a lane's accumulators

// A lane's codes of one chunk, less their rows' zero points, as pairs [slot][pair].
template <class S, class T>
__device__ inline void expand(const uint4 (&codes)[S::PARTS], const typename T::Zero (&zeros)[4],
                              uint32_t (&pairs)[4][4]) {
  if constexpr (S::BITS == 4) {
    T::expand4(codes[0].x, zeros[0], pairs[0]);
    T::expand4(codes[0].y, zeros[1], pairs[1]);
    T::expand4(codes[0].z, zeros[2], pairs[2]);
    T::expand4(codes[0].w, zeros[3], pairs[3]);
  } else {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      T::expand8(codes[part].x, codes[part].y, zeros[2 * part], pairs[2 * part]);
      T::expand8(codes[part].z, codes[part].w, zeros[2 * part + 1], pairs[2 * part + 1]);
    }
  }
}

// The zero points of a lane's four slots.
template <class S, class T>
__device__ inline void load_zeros(const uint8_t* stage, int group, int warp, int lane, typename T::Zero (&zeros)[4]) {
  uint32_t stored = (1u << (S::BITS - 1)) * 0x01010101;  // symmetric: the middle of the codes
  if constexpr (S::ZEROS) stored = *reinterpret_cast<const uint32_t*>(stage + zero_offset<S>(group, warp, lane));
#pragma unroll
  for (int slot = 0; slot < 4; slot++) zeros[slot] = T::zero(stored >> 8 * slot & 255);
}

template <class S>
__device__ inline void load_scales(const uint8_t* stage, int group, int warp, int lane, bool bfloat_scales,
                                   float (&scales)[4]) {
  const uint8_t* stored = stage + scale_offset<S>(group, warp, lane);
  if constexpr (S::SCALE_BYTES == 4) {
    const float4 v = *reinterpret_cast<const float4*>(stored);
    scales[0] = v.x, scales[1] = v.y, scales[2] = v.z, scales[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(stored);
#pragma unroll
    for (int slot = 0; slot < 4; slot++) {
      const uint16_t bits = uint16_t((slot < 2 ? v.x : v.y) >> 16 * (slot % 2));
      const float half = float_of_half(bits);  // both, which costs less than a branch
      scales[slot] = bfloat_scales ? float_of_bfloat(bits) : half;
    }
  }
}

// sums += scale * (codes less zero points, times tokens) over one group of a tile.
template <class S, class T>
__device__ inline void multiply_group(const uint8_t* stage, int group, int warp, int lane, bool bfloat_scales,
                                      Sums<S>& sums) {
  typename T::Zero zeros[4];
  load_zeros<S, T>(stage, group, warp, lane, zeros);
  Sums<S> products = {};
#pragma unroll
  for (int i = 0; i < S::GROUP_CHUNKS; i++) {
    const int chunk = group * S::GROUP_CHUNKS + i;
    uint4 codes[S::PARTS];
#pragma unroll
    for (int part = 0; part < S::PARTS; part++) {
      codes[part] = reinterpret_cast<const uint4*>(stage)[code_vector<S>(warp, chunk, part, lane)];
    }
    uint32_t pairs[4][4];
    expand<S, T>(codes, zeros, pairs);
#pragma unroll
    for (int column = 0; column < S::COLUMNS; column++) {
      const uint4 x = *reinterpret_cast<const uint4*>(stage + token_offset<S>(column, chunk, lane));
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const auto& low = pairs[2 * m];
        const auto& high = pairs[2 * m + 1];
        T::mma(products[m][column], low[0], high[0], low[1], high[1], x.x, x.y);
        T::mma(products[m][column], low[2], high[2], low[3], high[3], x.z, x.w);
      }
    }
  }
  float scales[4];
  load_scales<S>(stage, group, warp, lane, bfloat_scales, scales);
#pragma unroll
  for (int slot = 0; slot < 4; slot++) {
#pragma unroll
    for (int column = 0; column < S::COLUMNS; column++) {
#pragma unroll
      for (int c = slot % 2 * 2; c < slot % 2 * 2 + 2; c++) {
        float& sum = sums[slot / 2][column][c];
        sum = fmaf(scales[slot], products[slot / 2][column][c], sum);
      }
    }
  }
}

template <class S, class T>
__device__ inline void store(const Params& p, int row_block, int warp, int lane, const Sums<S>& sums) {
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int row = row_block * TILE_ROWS + warp * WARP_ROWS + m * 16 + accumulator_row(lane, c);
      if (row >= p.rows) continue;
      const float bias = p.bias ? p.bias[row] : 0.0f;
#pragma unroll
      for (int column = 0; column < S::COLUMNS; column++) {
        const int token = column * 8 + accumulator_token(lane, c);
        if (token >= p.n) continue;
        const int64_t place = token * p.y_stride + row;
        const float value = sums[m][column][c] + bias;
        if (p.float_y) {
          static_cast<float*>(p.y)[place] = value;
        } else {
          static_cast<uint16_t*>(p.y)[place] = T::from_float(value);
        }
      }
    }
  }
}

// A thread's values in a slot of the workspace, 16 bytes each, neighbours next to each other.
template <class S>
__device__ inline float4* partials(const Params& p, int slot) {
  return reinterpret_cast<float4*>(p.workspace) + int64_t(slot) * 2 * S::COLUMNS * THREADS + threadIdx.x;
}

// Leaves this block's part of a shared row block. True in the one block that came last: its sums are then the whole.
template <class S>
__device__ inline bool combine(const Params& p, const Split& split, int row_block, int* came_last, Sums<S>& sums) {
  float4* own = partials<S>(p, workspace_slot(split, p.k_tiles, blockIdx.x, row_block));
#pragma unroll
  for (int i = 0; i < 2 * S::COLUMNS; i++) {
    const float(&v)[4] = sums[i / S::COLUMNS][i % S::COLUMNS];
    store_shared_by_all(own + i * THREADS, float4{v[0], v[1], v[2], v[3]});
  }
  const int first = split.block_of(row_block * p.k_tiles), last = split.block_of((row_block + 1) * p.k_tiles - 1);
  __syncthreads();
  if (threadIdx.x == 0) {  // fences are cumulative: what the barrier ordered before this one, others see after theirs
    __threadfence();
    *came_last = atomicAdd(p.arrivals + row_block, 1) == last - first;
    __threadfence();
  }
  __syncthreads();
  if (!*came_last) return false;
  for (int block = first; block <= last; block++) {
    const float4* part = partials<S>(p, workspace_slot(split, p.k_tiles, block, row_block));
#pragma unroll
    for (int i = 0; i < 2 * S::COLUMNS; i++) {
      const float4 v = load_shared_by_all(part + i * THREADS);
      float(&sum)[4] = sums[i / S::COLUMNS][i % S::COLUMNS];
      sum[0] = block == first ? v.x : sum[0] + v.x;
      sum[1] = block == first ? v.y : sum[1] + v.y;
      sum[2] = block == first ? v.z : sum[2] + v.z;
      sum[3] = block == first ? v.w : sum[3] + v.w;
    }
  }
  if (threadIdx.x == 0) p.arrivals[row_block] = 0;  // for the next launch
  return true;
}

template <class S, class T, bool BULK>
__device__ inline void matmul(const Params& p, uint8_t* memory) {
  constexpr int AT_ONCE = S::COLUMNS <= 4 ? S::GROUPS : 1;  // groups: more would not fit the registers
  const Split split{p.row_blocks * p.k_tiles, int(gridDim.x)};
  const int end = split.first(blockIdx.x + 1), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int* came_last = reinterpret_cast<int*>(memory + S::STAGES * S::STAGE_BYTES + RESERVED / 2);
  int tile = split.first(blockIdx.x);
  let_next_grid_start();  // it touches nothing but its weights before all of this grid has ended
  Ring<S, BULK> ring(p, memory, tile, end);
  while (tile < end) {
    const int row_block = tile / p.k_tiles, begin = row_block * p.k_tiles, until = begin + p.k_tiles;
    const bool whole = tile == begin && until <= end;
    Sums<S> sums = {};
    for (; tile < until && tile < end; tile++) {
      const uint8_t* stage = ring.next();
#pragma unroll AT_ONCE
      for (int group = 0; group < S::GROUPS; group++) {
        multiply_group<S, T>(stage, group, warp, lane, p.bfloat_scales, sums);
      }
    }
    if (whole || combine<S>(p, split, row_block, came_last, sums)) store<S, T>(p, row_block, warp, lane, sums);
  }
}

}  // namespace quantspec
