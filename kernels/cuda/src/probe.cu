// out[64, 64] = a[64, 128] b[64, 128]^T by mma.sync and by wgmma, for the question whether they agree to the bit. One
// block of four warps each; a takes the side of the weights, in registers, and b that of the tokens.
#include "ptx.h"

namespace quantspec {

constexpr int PROBE_K = 128, STEPS = PROBE_K / 16, TOKENS = 64, COLUMNS = TOKENS / 8;

struct ProbeParams {  // mirrored in probe.py
  const uint16_t *a, *b;
  float* out;
};

// A lane's part of a, the same for both instructions.
__device__ inline void load_a(const ProbeParams& p, uint32_t (&a)[STEPS][4]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = warp * 16 + g + i % 2 * 8, k = step * 16 + 2 * t + i / 2 * 8;
      a[step][i] = *reinterpret_cast<const uint32_t*>(p.a + row * PROBE_K + k);
    }
  }
}

__device__ inline void store_sums(const ProbeParams& p, const float (&sums)[4 * COLUMNS]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4 * COLUMNS; i++) {
    const int row = warp * 16 + g + i % 4 / 2 * 8, token = i / 4 * 8 + 2 * t + i % 2;
    p.out[row * TOKENS + token] = sums[i];
  }
}

template <bool BFLOAT>
__device__ inline void by_mma(const ProbeParams& p) {
  uint32_t a[STEPS][4];
  load_a(p, a);
  float sums[4 * COLUMNS] = {};
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int column = 0; column < COLUMNS; column++) {
    float part[4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const uint16_t* b = p.b + (column * 8 + g) * PROBE_K + step * 16 + 2 * t;
      const uint32_t low = *reinterpret_cast<const uint32_t*>(b), high = *reinterpret_cast<const uint32_t*>(b + 8);
      const auto& s = a[step];
      BFLOAT ? mma_bfloat(part, s[0], s[1], s[2], s[3], low, high) : mma_half(part, s[0], s[1], s[2], s[3], low, high);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[4 * column + i] = part[i];
  }
  store_sums(p, sums);
}

#define QS_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QS_WGMMA(type)                                                                                               \
  asm volatile(                                                                                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                    \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
      "%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"                                                            \
      : QS_SUMS(0), QS_SUMS(4), QS_SUMS(8), QS_SUMS(12), QS_SUMS(16), QS_SUMS(20), QS_SUMS(24), QS_SUMS(28)          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <bool BFLOAT>
__device__ inline void wgmma(float (&d)[4 * COLUMNS], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (BFLOAT) {
    QS_WGMMA("bf16");
  } else {
    QS_WGMMA("f16");
  }
}

// Shared memory as wgmma reads it unswizzled, k first: 8 tokens x 8 k are 128 bytes in a row, then the next 8 k; after
// 16 k the next 8 tokens; after all tokens the next step.
__device__ inline int place_of(int token, int k) {
  return k / 16 * 16 * TOKENS + token / 8 * 128 + k % 16 / 8 * 64 + token % 8 * 8 + k % 8;
}

__device__ inline uint64_t descriptor(const uint16_t* b) {
  constexpr uint64_t NEXT_K = 128 / 16, NEXT_TOKENS = 256 / 16;  // in units of 16 bytes
  return uint64_t(shared_address(b)) >> 4 | NEXT_K << 16 | NEXT_TOKENS << 32;
}

template <bool BFLOAT>
__device__ inline void by_wgmma(const ProbeParams& p) {
  __shared__ __align__(128) uint16_t b[TOKENS * PROBE_K];
  for (int i = threadIdx.x; i < TOKENS * PROBE_K; i += blockDim.x) b[place_of(i / PROBE_K, i % PROBE_K)] = p.b[i];
  uint32_t a[STEPS][4];
  load_a(p, a);
  float sums[4 * COLUMNS] = {};
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int step = 0; step < STEPS; step++) wgmma<BFLOAT>(sums, a[step], descriptor(b + step * 16 * TOKENS));
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  store_sums(p, sums);
}

}  // namespace quantspec

#define QS_PROBE(name, how, bfloat)                                       \
  extern "C" __global__ void __launch_bounds__(128, 1)                    \
      qs_probe_##name(const __grid_constant__ quantspec::ProbeParams p) { \
    quantspec::how<bfloat>(p);                                            \
  }

QS_PROBE(mma_half, by_mma, false)
QS_PROBE(mma_bfloat, by_mma, true)
QS_PROBE(wgmma_half, by_wgmma, false)
QS_PROBE(wgmma_bfloat, by_wgmma, true)
