// One forward of a decoder layer of an EAGLE head, which continues a target's features, in one call.
#pragma once

#include "attention.h"

namespace quantspec {

struct EagleLayer {  // mirrored in eagle.py
  Linear fc, qkv, o, gate_up, down;
  const float* norm;  // [hidden], before the MLP
  // Without fc (EAGLE-3), norms [hidden] before attention: of the embedding and of the feature, which it reads side by
  // side, or of the feature alone where hidden_norm is null (a layer after the first).
  const float *input_norm, *hidden_norm;
  float eps;
  int32_t heads, kv_heads, head_dim;
  int32_t residual_normed;  // the residual stream starts from the normed feature
  int32_t integer;          // quantized weights meet int8 activations
};

// Rows of a forward: m slots from `start` on. `cos, sin` hold one row of head_dim values per slot, or one for all
// (step 0). bias [m, width] is added to the scores of the last `width` slots; every slot before is seen by all.
struct EagleRows {
  int m, start, width;
  const float *cos, *sin, *bias;
  int64_t step;
};

struct EagleCache {  // [2, kv_heads, capacity, head_dim]
  float* kv;
  int64_t capacity;
};

// Queries are scaled and rotated where they are; keys and values go to the cache.
inline void place_row(const EagleLayer& w, const EagleRows& rows, const EagleCache& cache, int i, float* qkv) {
  const int d = w.head_dim;
  const float *cos = rows.cos + i * rows.step, *sin = rows.sin + i * rows.step;
  const float scale = 1.0f / std::sqrt(float(d));
  for (int h = 0; h < w.heads; h++) rotate(qkv + h * d, cos, sin, d / 2, scale, qkv + h * d);
  const float *keys = qkv + w.heads * d, *values = keys + w.kv_heads * d;
  for (int h = 0; h < w.kv_heads; h++) {
    float* slot = cache.kv + (h * cache.capacity + rows.start + i) * d;
    rotate(keys + h * d, cos, sin, d / 2, 1.0f, slot);
    std::memcpy(slot + w.kv_heads * cache.capacity * d, values + h * d, sizeof(float) * d);
  }
}

// The query heads of key-value head h, for rows first .. first + count - 1: out [m, heads * head_dim].
inline void attend_rows(const EagleLayer& w, const EagleRows& rows, const EagleCache& cache, int h, int first,
                        int count, const float* qkv, float* out) {
  static thread_local Buffer buffer;
  const int d = w.head_dim, padded = (d + LANES - 1) / LANES * LANES, group = w.heads / w.kv_heads, n = count * group;
  const int end = rows.start + rows.m;
  const int64_t ldq = int64_t(w.heads + 2 * w.kv_heads) * d, lds = (end + 4 + LANES - 1) / LANES * LANES;
  float* q = buffer.get<float>(n * (2 * padded + lds));
  float *sums = q + n * padded, *scores = sums + n * padded;
  std::memset(q, 0, sizeof(float) * 2 * n * padded);
  for (int i = 0; i < n; i++) {
    std::memcpy(q + i * padded, qkv + (first + i / group) * ldq + (h * group + i % group) * d, sizeof(float) * d);
  }
  const float* keys = cache.kv + h * cache.capacity * d;
  const float* values = keys + w.kv_heads * cache.capacity * d;
  score(
      q, n, padded, d, [&](int slot) { return keys + int64_t(slot) * d; }, end, scores, lds);
  for (int i = 0; i < n; i++) {
    float* row = scores + i * lds;
    const float* bias = rows.bias + int64_t(first + i / group) * rows.width;
    for (int j = 0; j < rows.width; j++) row[end - rows.width + j] += bias[j];
    q[i * padded] = softmax(row, end);  // the inverse of the sum of weights waits where the query was
  }
  weigh(
      scores, lds, n, [&](int slot) { return values + int64_t(slot) * d; }, end, d, sums, padded);
  for (int i = 0; i < n; i++) {
    float* to = out + (first + i / group) * int64_t(w.heads) * d + (h * group + i % group) * d;
    const vf inverse = set1(q[i * padded]);
    for (int j = 0; j < d; j += LANES) store_some(to + j, mul(load(sums + i * padded + j), inverse), d - j);
  }
}

// The residual stream `x` [m, hidden] before the layer, and queries, keys and values `qkv` of it.
inline void read_slots(const EagleLayer& w, int m, const float* features, const float* embeddings, float* x,
                       float* qkv) {
  const int hidden = w.o.rows;
  const auto at = [=](const float* from, int i) { return from + int64_t(i) * hidden; };
  if (w.fc.rows) {
    const auto pair = [&](int i, float* row) {
      std::memcpy(row, at(embeddings, i), sizeof(float) * hidden);
      std::memcpy(row + hidden, at(features, i), sizeof(float) * hidden);
    };
    matmul(w.fc, m, pair, x, hidden, false, w.integer);
    const auto copy = [&](int i, float* row) { std::memcpy(row, at(x, i), sizeof(float) * hidden); };
    matmul(w.qkv, m, copy, qkv, w.qkv.rows, false, w.integer);
    return;
  }
  for (int i = 0; i < m; i++) {
    float* row = x + int64_t(i) * hidden;
    if (w.residual_normed) {
      rms_norm(at(features, i), w.hidden_norm, hidden, w.eps, row);
    } else {
      std::memcpy(row, at(features, i), sizeof(float) * hidden);
    }
  }
  const auto normed = [&](int i, float* row) {
    rms_norm(at(w.hidden_norm ? embeddings : features, i), w.input_norm, hidden, w.eps, row);
    if (w.hidden_norm) rms_norm(at(features, i), w.hidden_norm, hidden, w.eps, row + hidden);
  };
  matmul(w.qkv, m, normed, qkv, w.qkv.rows, false, w.integer);
}

// features [m, H] and embeddings [m, H] (null where they are not read) to out [m, H].
inline void eagle_forward(const EagleLayer& w, const EagleRows& rows, const EagleCache& cache, const float* features,
                          const float* embeddings, float* out) {
  static thread_local Buffer buffer;
  const int m = rows.m, hidden = w.o.rows, wide = w.qkv.rows, mixed = w.o.cols, mlp = w.down.cols;
  const Alone alone(int64_t(m) * hidden * (2 * hidden + wide + mixed + 3 * mlp) <= WORTH_THREADS);
  float* qkv = buffer.get<float>(int64_t(m) * (wide + mixed + 2 * mlp));
  float *heads = qkv + int64_t(m) * wide, *gate_up = heads + int64_t(m) * mixed;

  read_slots(w, m, features, embeddings, out, qkv);
  for (int i = 0; i < m; i++) place_row(w, rows, cache, i, qkv + int64_t(i) * wide);
  const int blocks = (m + QUERIES - 1) / QUERIES;
  parallel_for(blocks * w.kv_heads, [&](int chunk) {
    const int first = chunk / w.kv_heads * QUERIES, count = m - first < QUERIES ? m - first : QUERIES;
    attend_rows(w, rows, cache, chunk % w.kv_heads, first, count, qkv, heads);
  });
  const auto mixed_of = [&](int i, float* row) {
    std::memcpy(row, heads + int64_t(i) * mixed, sizeof(float) * mixed);
  };
  matmul(w.o, m, mixed_of, out, hidden, true, w.integer);
  const auto normed = [&](int i, float* row) { rms_norm(out + int64_t(i) * hidden, w.norm, hidden, w.eps, row); };
  matmul(w.gate_up, m, normed, gate_up, 2 * mlp, false, w.integer);
  const auto active = [&](int i, float* row) { swiglu(gate_up + int64_t(i) * 2 * mlp, mlp, row); };
  matmul(w.down, m, active, out, hidden, true, w.integer);
}

}  // namespace quantspec

extern "C" {

// `eagle_forward`; kv [2, kv_heads, capacity, head_dim] gets slots start on. Returns a `status_of`.
QS_EXPORT int qs_eagle_forward(const quantspec::EagleLayer* layer, int m, const float* features,
                               const float* embeddings, const float* cos, const float* sin, int64_t step, float* kv,
                               int64_t capacity, int start, const float* bias, int width, float* out) {
  return quantspec::status_of([&] {
    quantspec::eagle_forward(*layer, {m, start, width, cos, sin, bias, step}, {kv, capacity}, features, embeddings,
                             out);
  });
}

}  // extern "C"
