// Operations on single rows of fp32. Sums run over index mod 32 and then over lanes, in one order, so that a row's bits
// depend on that row alone.
#pragma once

#include "simd.h"

namespace quantspec {

// Fewer than eight floats, the other lanes zero.
#ifdef QS_AVX2
inline vi first_lanes(int count) { return _mm256_cmpgt_epi32(set1(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline vf load_part(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
inline void store_part(float* p, vf a, int count) { _mm256_maskstore_ps(p, first_lanes(count), a); }
#else
inline vf load_part(const float* p, int count) {
  return each<vf>([&](int i) { return i < count ? p[i] : 0.0f; });
}
inline void store_part(float* p, vf a, int count) { std::memcpy(p, a.at, sizeof(float) * count); }
#endif

inline vf load_some(const float* p, int left) { return left >= LANES ? load(p) : load_part(p, left); }

inline void store_some(float* p, vf a, int left) {
  if (left >= LANES) {
    store(p, a);
  } else {
    store_part(p, a, left);
  }
}

// The sums of four vectors' lanes, each by the same tree.
#ifdef QS_AVX2
inline void sum_lanes(const vf (&a)[4], float* out) {
  const vf quarters = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
}
#else
inline void sum_lanes(const vf (&a)[4], float* out) {
  for (int i = 0; i < 4; i++) {
    const float* x = a[i].at;
    out[i] = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
}
#endif

inline float sum_lanes(vf a) {
  float sums[4];
  const vf all[4] = {a, a, a, a};
  sum_lanes(all, sums);
  return sums[0];
}

// e^x to about 1e-7 of its value; arguments are clamped to where the result is a normal number, NaN stays NaN.
inline vf exp(vf x) {
  x = min(set1(88.0f), max(set1(-87.0f), x));  // this order of operands lets NaN through
  const vf n = round(mul(x, set1(1.44269504f)));
  // ln 2 in two parts, the first with few enough bits that its product with n is exact.
  const vf r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), x));
  constexpr float factorials[] = {1, 1, 2, 6, 24, 120, 720, 5040};  // |r| <= ln(2) / 2 leaves 5e-9 of the series
  vf sum = set1(1 / factorials[7]);
  for (int i = 6; i >= 0; i--) sum = fma(sum, r, set1(1 / factorials[i]));
  return mul(sum, as_float(shift_left(add(to_int(n), set1(127)), 23)));
}

// Root mean square norm (arXiv 1910.07467); `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  vf squares[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    for (int j = 0; j < 4; j++) {
      const vf value = load(x + i + j * LANES);
      squares[j] = fma(value, value, squares[j]);
    }
  }
  for (int j = 0; i < n; i += LANES, j++) {
    const vf value = load_some(x + i, n - i);
    squares[j] = fma(value, value, squares[j]);
  }
  const float sum = sum_lanes(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  const vf scale = set1(1.0f / std::sqrt(sum / float(n) + eps));
  for (i = 0; i < n; i += LANES) {
    const vf value = mul(mul(load_some(x + i, n - i), scale), load_some(weight + i, n - i));
    store_some(out + i, value, n - i);
  }
}

// silu(gate) * up of one row of [gate, up], `n` values each.
inline void swiglu(const float* gate_up, int n, float* out) {
  for (int i = 0; i < n; i += LANES) {
    const vf gate = load_some(gate_up + i, n - i), up = load_some(gate_up + n + i, n - i);
    const vf silu = div(gate, add(set1(1.0f), exp(sub(set1(0.0f), gate))));
    store_some(out + i, mul(silu, up), n - i);
  }
}

// Rotary embedding of one head and a factor. `cos, sin [2 half]`, the first half of sin negated; `out` may be `x`.
inline void rotate(const float* x, const float* cos, const float* sin, int half, float factor, float* out) {
  for (int i = 0; i < half; i += LANES) {
    const int left = half - i;
    const vf first = load_some(x + i, left), second = load_some(x + half + i, left), turn = load_some(cos + i, left);
    const vf new_first = fma(second, load_some(sin + i, left), mul(first, turn));
    const vf new_second = fma(first, load_some(sin + half + i, left), mul(second, turn));
    store_some(out + i, mul(new_first, set1(factor)), left);
    store_some(out + half + i, mul(new_second, set1(factor)), left);
  }
}

// Scores to e^(score - max), in place; returns the inverse of their sum, which runs over index mod 8.
inline float softmax(float* scores, int n) {
  vf most = set1(scores[0]);
  int i = 0;
  for (; i + LANES <= n; i += LANES) most = max(load(scores + i), most);
  alignas(32) float lanes[LANES];
  store(lanes, most);
  float peak = lanes[0];
  for (int j = 1; j < LANES; j++) peak = lanes[j] > peak ? lanes[j] : peak;
  for (; i < n; i++) peak = scores[i] > peak ? scores[i] : peak;
  vf sum = set1(0.0f);
  for (i = 0; i < n; i += LANES) {
    store_some(scores + i, exp(sub(load_some(scores + i, n - i), set1(peak))), n - i);
    sum = add(sum, load_some(scores + i, n - i));
  }
  return 1.0f / sum_lanes(sum);
}

}  // namespace quantspec

extern "C" {

// x [n, size] to out [n, size].
QS_EXPORT void qs_rms_norm(const float* x, const float* weight, int n, int size, float eps, float* out) {
  for (int i = 0; i < n; i++) quantspec::rms_norm(x + int64_t(i) * size, weight, size, eps, out + int64_t(i) * size);
}

// The two below are for tests. One row: [gate, up] to out [size]; scores [size] in place.
QS_EXPORT void qs_swiglu(const float* gate_up, int size, float* out) { quantspec::swiglu(gate_up, size, out); }
QS_EXPORT float qs_softmax(float* scores, int size) { return quantspec::softmax(scores, size); }

}  // extern "C"
