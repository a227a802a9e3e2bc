// Eight floats or 32-bit integers at a time: AVX2 where the compiler may use it, plain arrays elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QS_AVX2 1
#include <immintrin.h>
// Only for intrinsics: on plain loops it made g++ 12 emit wrong code at -O2, and doubled the time to compile.
#define QS_UNROLL(n) _Pragma(QS_TEXT(GCC unroll n))
#define QS_TEXT(x) #x
#else
#define QS_UNROLL(n)
#endif

namespace quantspec {

constexpr int LANES = 8;

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

#ifdef QS_AVX2

using vf = __m256;
using vi = __m256i;

inline vf set1(float x) { return _mm256_set1_ps(x); }
inline vi set1(int32_t x) { return _mm256_set1_epi32(x); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vi load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const vi*>(p)); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline void store(int32_t* p, vi a) { _mm256_storeu_si256(reinterpret_cast<vi*>(p), a); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline vf round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vi add(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline vi mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
inline vi bit_and(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi bit_or(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi shift_left(vi a, int bits) { return _mm256_slli_epi32(a, bits); }
inline vi shift_right(vi a, int bits) { return _mm256_srli_epi32(a, bits); }
inline vi shift_right_signed(vi a, int bits) { return _mm256_srai_epi32(a, bits); }
inline vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
inline vi to_int(vf a) { return _mm256_cvtps_epi32(a); }  // to the nearest, ties to even
inline vf as_float(vi a) { return _mm256_castsi256_ps(a); }
inline void store_bytes(vi a, int32_t* first, int32_t* second) {  // lanes 0-3 and 4-7, as a byte each
  const __m256i words = _mm256_packs_epi32(a, a), bytes = _mm256_packs_epi16(words, words);
  *first = _mm256_extract_epi32(bytes, 0);
  *second = _mm256_extract_epi32(bytes, 4);
}
inline void store_pairs(vi a, int32_t* p, int stride) {  // lanes two by two, as 16 bits each
  const __m256i words = _mm256_packs_epi32(a, a);
  p[0] = _mm256_extract_epi32(words, 0);
  p[stride] = _mm256_extract_epi32(words, 1);
  p[2 * stride] = _mm256_extract_epi32(words, 4);
  p[3 * stride] = _mm256_extract_epi32(words, 5);
}
inline vi load_pairs(const uint8_t* p) {  // two signed bytes in each lane, as 16 bits each
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vi load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void store_u8(vi a, uint8_t* p) {  // of 0 to 255
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline vf load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline vf load_bf16(const void* p) {
  return as_float(shift_left(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
}

#else

template <class T>
struct Lanes {
  T at[LANES];
};
using vf = Lanes<float>;
using vi = Lanes<int32_t>;

template <class A, class F>
inline A each(F&& f) {
  A result;
  for (int i = 0; i < LANES; i++) result.at[i] = f(i);
  return result;
}
// clang-format off
inline vf set1(float x) { return each<vf>([&](int) { return x; }); }
inline vi set1(int32_t x) { return each<vi>([&](int) { return x; }); }
inline vf load(const float* p) { return each<vf>([&](int i) { return p[i]; }); }
inline vi load(const int32_t* p) { return each<vi>([&](int i) { return p[i]; }); }
inline void store(float* p, vf a) { std::memcpy(p, a.at, sizeof a.at); }
inline void store(int32_t* p, vi a) { std::memcpy(p, a.at, sizeof a.at); }
inline vf add(vf a, vf b) { return each<vf>([&](int i) { return a.at[i] + b.at[i]; }); }
inline vf sub(vf a, vf b) { return each<vf>([&](int i) { return a.at[i] - b.at[i]; }); }
inline vf mul(vf a, vf b) { return each<vf>([&](int i) { return a.at[i] * b.at[i]; }); }
inline vf div(vf a, vf b) { return each<vf>([&](int i) { return a.at[i] / b.at[i]; }); }
inline vf max(vf a, vf b) { return each<vf>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; }); }
inline vf min(vf a, vf b) { return each<vf>([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; }); }
inline vf fma(vf a, vf b, vf c) { return each<vf>([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); }); }
inline vf abs(vf a) { return each<vf>([&](int i) { return std::fabs(a.at[i]); }); }
inline vf round(vf a) { return each<vf>([&](int i) { return std::nearbyint(a.at[i]); }); }
inline vi add(vi a, vi b) { return each<vi>([&](int i) { return a.at[i] + b.at[i]; }); }
inline vi sub(vi a, vi b) { return each<vi>([&](int i) { return a.at[i] - b.at[i]; }); }
inline vi mul(vi a, vi b) { return each<vi>([&](int i) { return a.at[i] * b.at[i]; }); }
inline vi bit_and(vi a, vi b) { return each<vi>([&](int i) { return a.at[i] & b.at[i]; }); }
inline vi bit_or(vi a, vi b) { return each<vi>([&](int i) { return a.at[i] | b.at[i]; }); }
inline vi shift_left(vi a, int bits) { return each<vi>([&](int i) { return int32_t(uint32_t(a.at[i]) << bits); }); }
inline vi shift_right(vi a, int bits) { return each<vi>([&](int i) { return int32_t(uint32_t(a.at[i]) >> bits); }); }
inline vi shift_right_signed(vi a, int bits) { return each<vi>([&](int i) { return a.at[i] >> bits; }); }
inline vf to_float(vi a) { return each<vf>([&](int i) { return float(a.at[i]); }); }
// clang-format on
inline vi to_int(vf a) {  // what is not a number becomes what the AVX2 instruction makes of it
  return each<vi>([&](int i) { return std::isnan(a.at[i]) ? INT32_MIN : int32_t(std::nearbyint(a.at[i])); });
}
inline vf as_float(vi a) {
  vf result;
  std::memcpy(&result, &a, sizeof a);
  return result;
}
inline void store_bytes(vi a, int32_t* first, int32_t* second) {
  int8_t bytes[LANES];
  for (int i = 0; i < LANES; i++) bytes[i] = int8_t(a.at[i]);
  std::memcpy(first, bytes, 4);
  std::memcpy(second, bytes + 4, 4);
}
inline void store_pairs(vi a, int32_t* p, int stride) {
  for (int i = 0; i < LANES; i += 2) p[i / 2 * stride] = int32_t(uint32_t(a.at[i + 1]) << 16 | uint16_t(a.at[i]));
}
inline vi load_pairs(const uint8_t* p) {
  return each<vi>([&](int i) { return int32_t(int8_t(p[2 * i + 1])) * 65536 + uint16_t(int8_t(p[2 * i])); });
}
inline vi load_u8(const uint8_t* p) {
  return each<vi>([&](int i) { return int32_t(p[i]); });
}
inline void store_u8(vi a, uint8_t* p) {
  for (int i = 0; i < LANES; i++) p[i] = uint8_t(a.at[i]);
}
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) {  // zero and subnormal numbers are multiples of 2^-24
    const float value = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline vf load_f16(const void* p) {
  return each<vf>([&](int i) { return half_to_float(static_cast<const uint16_t*>(p)[i]); });
}
inline vf load_bf16(const void* p) {
  return as_float(each<vi>([&](int i) { return int32_t(uint32_t(static_cast<const uint16_t*>(p)[i]) << 16); }));
}

#endif

}  // namespace quantspec
