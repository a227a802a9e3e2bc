// Attention of rows of one sequence over their paths: the cached prefix, then a row's ancestors in the same forward.
//
// A row's result is a function of its query and of its path's keys and values in *logical* order (by depth) alone: each
// score is one dot product, the sum of weights runs over the index within the attended range, and each output value is
// one chain of multiply-adds over the path. So a node of a tree and the same path decoded alone agree to the bit.
#pragma once

#include "linear.h"
#include "ops.h"

namespace quantspec {

constexpr int QUERIES = 8;  // that share each loaded key and value, about

struct Shape {
  int heads, kv_heads, head_dim;
  int group() const { return heads / kv_heads; }
  int padded() const { return (head_dim + LANES - 1) / LANES * LANES; }
};

// Rows first .. first + count - 1 of one sequence, whose paths are slots 0 .. shared - 1 and then their own.
struct RowBlock {
  int first, count, sequence, shared;
};

// Where the rows of a forward stand.
struct RowTable {
  const int32_t *parents, *starts, *cached;  // as in Batch
  int32_t *position, *sequence, *straight;   // per row; straight: its path is slots 0, 1, ..., its own
  int slot(int row) const { return cached[sequence[row]] + row - starts[sequence[row]]; }
};

struct Keys {  // of one sequence, layer and key-value head: slots of head_dim values
  const float *keys, *values;
};

// Dot products of Q queries [Q, padded] with four keys.
template <int Q>
inline void dot_four(const float* queries, int padded, const float* const (&keys)[4], int d, float* scores, int64_t lds) {
  vf sums[Q][4];
  for (int q = 0; q < Q; q++) {
    for (int k = 0; k < 4; k++) sums[q][k] = set1(0.0f);
  }
  for (int j = 0; j < d; j += LANES) {
    vf key[4];
    for (int k = 0; k < 4; k++) key[k] = load_some(keys[k] + j, d - j);
    for (int q = 0; q < Q; q++) {
      const vf query = load(queries + q * padded + j);
      for (int k = 0; k < 4; k++) sums[q][k] = fma(query, key[k], sums[q][k]);
    }
  }
  for (int q = 0; q < Q; q++) sum_lanes(sums[q], scores + q * lds);
}

// scores[q, i] of `count` keys at key(i); up to three scores past the last are overwritten.
template <class At>
void score(const float* queries, int n, int padded, int d, At&& key, int count, float* scores, int64_t lds) {
  for (int i = 0; i < count; i += 4) {
    const float* keys[4];
    for (int k = 0; k < 4; k++) keys[k] = key(i + k < count ? i + k : count - 1);
    int q = 0;
    for (; q + 2 <= n; q += 2) dot_four<2>(queries + q * padded, padded, keys, d, scores + q * lds + i, lds);
    if (q < n) dot_four<1>(queries + q * padded, padded, keys, d, scores + q * lds + i, lds);
  }
}

// V vectors of Q outputs, from column j on: out += sum of weights[q, i] * value(i), in the order of i.
template <int Q, int V, class At>
inline void weigh_columns(const float* weights, int64_t ldw, At&& value, int count, int j, int d, float* out, int padded) {
  vf sums[Q][V];
  for (int q = 0; q < Q; q++) {
    for (int v = 0; v < V; v++) sums[q][v] = load(out + q * padded + j + v * LANES);
  }
  for (int i = 0; i < count; i++) {
    const float* from = value(i) + j;
    vf values[V];
    for (int v = 0; v < V; v++) values[v] = V > 1 ? load(from + v * LANES) : load_some(from, d - j);
    for (int q = 0; q < Q; q++) {
      const vf weight = set1(weights[q * ldw + i]);
      for (int v = 0; v < V; v++) sums[q][v] = fma(weight, values[v], sums[q][v]);
    }
  }
  for (int q = 0; q < Q; q++) {
    for (int v = 0; v < V; v++) store(out + q * padded + j + v * LANES, sums[q][v]);
  }
}

template <int Q, class At>
inline void weigh_queries(const float* weights, int64_t ldw, At&& value, int count, int d, float* out, int padded) {
  constexpr int V = 8 / Q;  // eight chains of multiply-adds hide each one's latency
  int j = 0;
  for (; j + V * LANES <= d; j += V * LANES) weigh_columns<Q, V>(weights, ldw, value, count, j, d, out, padded);
  for (; j + 4 * LANES <= d; j += 4 * LANES) weigh_columns<Q, 4>(weights, ldw, value, count, j, d, out, padded);
  for (; j < d; j += LANES) weigh_columns<Q, 1>(weights, ldw, value, count, j, d, out, padded);
}

template <class At>
void weigh(const float* weights, int64_t ldw, int n, At&& value, int count, int d, float* out, int padded) {
  int q = 0;
  for (; q + 2 <= n; q += 2) weigh_queries<2>(weights + q * ldw, ldw, value, count, d, out + q * padded, padded);
  if (q < n) weigh_queries<1>(weights + q * ldw, ldw, value, count, d, out + q * padded, padded);
}

// All query heads of one key-value head, for a block of rows. `queries` and `out` point to the first row's first such
// head, in rows of ldq and ldo values. `window` 0: the whole path.
inline void attend(const Shape& shape, const RowTable& table, const RowBlock& block, int window, Keys kv,
                   const float* queries, int64_t ldq, float* out, int64_t ldo) {
  static thread_local Buffer buffer, slot_buffer;
  const int d = shape.head_dim, padded = shape.padded(), group = shape.group(), n = block.count * group;
  const auto begin_of = [&](int row) {
    const int begin = table.position[row] + 1 - window;
    return window == 0 || begin < 0 ? 0 : begin;
  };
  int low = begin_of(block.first), high = 0;
  for (int row = block.first; row < block.first + block.count; row++) {
    low = begin_of(row) < low ? begin_of(row) : low;
    high = table.position[row] + 1 > high ? table.position[row] + 1 : high;
  }
  const int common = block.shared > low ? block.shared - low : 0;  // slots that all rows may attend
  const int64_t lds = (high - low + 4 + LANES - 1) / LANES * LANES;
  float* q = buffer.get<float>(n * (2 * padded + lds));
  float *sums = q + n * padded, *scores = sums + n * padded;
  std::memset(q, 0, sizeof(float) * 2 * n * padded);
  for (int i = 0; i < n; i++) std::memcpy(q + i * padded, queries + i / group * ldq + i % group * d, sizeof(float) * d);

  const auto shared_at = [&](const float* base) {
    return [base, low, d](int i) { return base + int64_t(low + i) * d; };
  };
  score(q, n, padded, d, shared_at(kv.keys), common, scores, lds);

  int32_t* slots = slot_buffer.get<int32_t>(int64_t(block.count) * (high - low));
  for (int i = 0; i < block.count; i++) {  // each row's own slots, its keys, and its weights
    const int row = block.first + i, begin = begin_of(row), length = table.position[row] + 1 - begin;
    const int tail = low + common > begin ? low + common : begin, own = table.position[row] + 1 - tail;
    int32_t* path = slots + i * int64_t(high - low);
    for (int left = own, ancestor = row; left-- > 0; ancestor = table.parents[ancestor] + table.starts[block.sequence]) {
      path[left] = table.slot(ancestor);
    }
    const auto key = [&](int p) { return kv.keys + int64_t(path[p]) * d; };
    float *row_q = q + i * group * padded, *row_sums = sums + i * group * padded, *row_scores = scores + i * group * lds;
    score(row_q, group, padded, d, key, own, row_scores + (tail - low), lds);
    for (int h = 0; h < group; h++) {
      // The inverse of the sum of weights waits where the query was.
      row_q[h * padded] = softmax(row_scores + h * lds + (begin - low), length);
      const int before = begin - low < common ? begin - low : common;
      std::memset(row_scores + h * lds, 0, sizeof(float) * before);  // attended by other rows of the block only
    }
    (void)row_sums;
  }
  weigh(scores, lds, n, shared_at(kv.values), common, d, sums, padded);
  for (int i = 0; i < block.count; i++) {
    const int row = block.first + i, begin = begin_of(row);
    const int tail = low + common > begin ? low + common : begin, own = table.position[row] + 1 - tail;
    const int32_t* path = slots + i * int64_t(high - low);
    const auto value = [&](int p) { return kv.values + int64_t(path[p]) * d; };
    weigh(scores + i * group * lds + (tail - low), lds, group, value, own, d, sums + i * group * padded, padded);
    for (int h = 0; h < group; h++) {
      const float* from = sums + (i * group + h) * padded;
      const vf inverse = set1(q[(i * group + h) * padded]);
      float* to = out + i * ldo + h * d;
      for (int j = 0; j < d; j += LANES) store_some(to + j, mul(load(from + j), inverse), d - j);
    }
  }
}

}  // namespace quantspec
