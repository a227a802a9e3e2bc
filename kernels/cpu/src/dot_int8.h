// Integer dot products of weights of 4 or 8 bits and int8 activations, with the instructions of each CPU level.
//
// Weights of 4 bits are the unsigned operand (0..15), so that AVX2's maddubs never saturates; the offset of 8 comes off
// as 8 * sum(x). Those of 8 bits would overflow its sums of two products: they meet activations of 16 bits in madd,
// which adds two products into 32. VNNI adds four products of bytes into 32 bits and cannot overflow: there weights of
// 8 bits are unsigned operands too, w + 128.
#pragma once

#include "simd.h"

namespace quantspec {

// What follows a group's products, eight output rows at a time.
struct EightRows {
  static constexpr int rows = 8;
  using V = vi;
  using F = vf;
  static V zeros(const uint8_t* p) { return load_u8(p); }
  static V without(V total, V zeros, int32_t sum) { return sub(total, mul(zeros, set1(sum))); }
  static F scales(int type, const uint8_t* group, int row) { return load_as(type, group, row); }
  static void add_to(float* out, V total, F scales, float scale) {
    store(out, fma(to_float(total), mul(scales, set1(scale)), load(out)));
  }
};

// A `Dot` multiplies a vector of weights (4 nibbles in each 32-bit lane, one lane an output row) by four activations:
// `mul` starts a partial sum, `mac` adds to it up to seven times, `flush` adds it to the 32-bit sums. `pairs` are two
// weights of 8 bits in each lane, which `mac_pairs` multiplies by two activations. With VNNI `mac` adds to the 32-bit
// sums at once, and `quads` are four weights of 8 bits in each lane.

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
  static V mac_pairs(V total, V w, V x) { return in_turn(_mm512_add_epi32(total, _mm512_madd_epi16(w, x))); }
  static V mul(V w, V x) { return _mm512_maddubs_epi16(w, x); }
  static V mac(V sum, V w, V x) { return in_turn(_mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x))); }
  static V in_turn(V sum) {  // as with AVX2, below
    asm("" : "+v"(sum));
    return sum;
  }
  static V flush(V total, V sum) { return _mm512_add_epi32(total, _mm512_madd_epi16(sum, _mm512_set1_epi16(1))); }
#endif
  static V zeros(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
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
struct Dot : EightRows {
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
};
#else
struct Dot : EightRows {
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

}  // namespace quantspec
