// Attention of rows of one sequence over their paths: the cached prefix, then a row's ancestors in the same forward.
//
// A row's result is a function of its query and of its path's keys and values in *logical* order (by depth) alone: each
// score is one dot product, the sum of weights runs over the index within the attended range, and each output value is
// one chain of multiply-adds over the path. So a node of a tree and the same path decoded alone agree to the bit.
#pragma once

#include "kv_cache.h"
#include "linear.h"
#include "ops.h"

namespace quantspec {

// That share each loaded key and value, about.
constexpr int QUERIES = 16;

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

// Dot products of Q queries [Q, padded] with four keys.
template <int Q>
inline void dot_four(const float* queries, int padded, const float* const (&keys)[4], int d, float* scores,
                     int64_t lds) {
  vf sums[Q][4];
  for (int q = 0; q < Q; q++) {
    for (int k = 0; k < 4; k++) sums[q][k] = set1(0.0f);
  }
  const auto add_products = [&](int j, auto load_key) {
    for (int k = 0; k < 4; k++) {
      const vf key = load_key(keys[k] + j);
      for (int q = 0; q < Q; q++) sums[q][k] = fma(load(queries + q * padded + j), key, sums[q][k]);
    }
  };
  int j = 0;
  for (; j + LANES <= d; j += LANES) add_products(j, [](const float* key) { return load(key); });
  if (j < d) add_products(j, [=](const float* key) { return load_part(key, d - j); });
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
inline void weigh_columns(const float* weights, int64_t ldw, At&& value, int count, int j, int d, float* out,
                          int padded) {
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

// A few positions at a time, so that their values stay in the first-level cache for all queries.
template <class At>
void weigh(const float* weights, int64_t ldw, int n, At&& value, int count, int d, float* out, int padded) {
  constexpr int TOGETHER = 64;
  for (int first = 0; first < count; first += TOGETHER) {
    const int now = count - first < TOGETHER ? count - first : TOGETHER;
    const auto at = [&](int i) { return value(first + i); };
    const float* from = weights + first;
    int q = 0;
    for (; q + 2 <= n; q += 2) weigh_queries<2>(from + q * ldw, ldw, at, now, d, out + q * padded, padded);
    if (q < n) weigh_queries<1>(from + q * ldw, ldw, at, now, d, out + q * padded, padded);
  }
}

struct From {  // slots one after the other
  int64_t first;
  int64_t operator()(int i) const { return first + i; }
};

struct Along {  // the slots of a path
  const int32_t* path;
  int64_t operator()(int i) const { return path[i]; }
};

// All query heads of one key-value head, for a block of rows. `queries` and `out` point to the first row's first such
// head, in rows of ldq and ldo values. `window` 0: the whole path.
class BlockAttention {
 public:
  BlockAttention(const Shape& shape, const RowTable& table, const RowBlock& block, int window)
      : table_(table),
        block_(block),
        window_(window),
        d_(shape.head_dim),
        padded_(shape.padded()),
        group_(shape.group()) {
    low_ = all_ = begin_of(0), high_ = end_of(0);
    for (int i = 1; i < block.count; i++) {
      low_ = begin_of(i) < low_ ? begin_of(i) : low_;
      all_ = begin_of(i) > all_ ? begin_of(i) : all_;
      high_ = end_of(i) > high_ ? end_of(i) : high_;
    }
    common_ = block.shared > low_ ? block.shared - low_ : 0;
    all_ = low_ + common_ < all_ ? low_ + common_ : all_;
    lds_ = (high_ - low_ + 3 + LANES) / LANES * LANES;  // room for what `score` writes past the last
  }

  void run(const KvRows& keys, const KvRows& values, const float* queries, int64_t ldq, float* out, int64_t ldo) {
    static thread_local Buffer buffer, slot_buffer;
    const int n = block_.count * group_;
    const int64_t tile = keys.format.tile_floats();
    tile_ = buffer.get<float>(tile + n * (2 * padded_ + lds_ + 1));
    queries_ = tile_ + tile;
    sums_ = queries_ + n * padded_;
    inverses_ = sums_ + n * padded_;
    scores_ = inverses_ + n;
    paths_ = slot_buffer.get<int32_t>(int64_t(block_.count) * (high_ - low_));
    std::memset(queries_, 0, sizeof(float) * 2 * n * padded_);
    for (int i = 0; i < n; i++) {
      std::memcpy(queries_ + i * padded_, queries + i / group_ * ldq + i % group_ * d_, sizeof(float) * d_);
    }
    score_rows(queries_, n, keys, From{low_}, common_, scores_);
    for (int i = 0; i < block_.count; i++) finish_scores(i, keys);
    for (int i = 0; i < block_.count; i++) start_sums(i, values);
    weigh_rows(scores_ + (all_ - low_), n, values, From{all_}, low_ + common_ - all_, sums_);
    for (int i = 0; i < block_.count; i++) finish_sums(i, values, out + i * ldo);
  }

 private:
  // Row i of the block attends positions begin_of(i) .. end_of(i) - 1; those from tail_of(i) on are its own.
  int begin_of(int i) const { return window_ == 0 || end_of(i) < window_ ? 0 : end_of(i) - window_; }
  int end_of(int i) const { return table_.position[block_.first + i] + 1; }
  int tail_of(int i) const { return low_ + common_ > begin_of(i) ? low_ + common_ : begin_of(i); }

  template <class Slot>
  void score_rows(const float* queries, int n, const KvRows& keys, Slot&& slot, int count, float* scores) const {
    kv_runs(keys, slot, count, tile_,
            [&](int first, int now, auto key) { score(queries, n, padded_, d_, key, now, scores + first, lds_); });
  }

  template <class Slot>
  void weigh_rows(const float* weights, int n, const KvRows& values, Slot&& slot, int count, float* out) const {
    kv_runs(values, slot, count, tile_,
            [&](int first, int now, auto value) { weigh(weights + first, lds_, n, value, now, d_, out, padded_); });
  }

  // The row's own slots, by way of its ancestors; their scores; and all of the row's weights.
  void finish_scores(int i, const KvRows& keys) {
    const int begin = begin_of(i), tail = tail_of(i), own = end_of(i) - tail, start = table_.starts[block_.sequence];
    int32_t* path = paths_ + i * int64_t(high_ - low_);
    for (int left = own, row = block_.first + i; left > 0; row = start + table_.parents[row]) {
      path[--left] = table_.slot(row);
    }
    float* scores = scores_ + i * group_ * lds_;
    score_rows(queries_ + i * group_ * padded_, group_, keys, Along{path}, own, scores + (tail - low_));
    for (int h = 0; h < group_; h++) {
      inverses_[i * group_ + h] = softmax(scores + h * lds_ + (begin - low_), end_of(i) - begin);
    }
  }

  // Slots before those that all rows attend. Weights of zero for the other rows would not do: zero times a value that
  // is not finite is not a number.
  void start_sums(int i, const KvRows& values) {
    const int begin = begin_of(i);
    const float* weights = scores_ + i * group_ * lds_ + (begin - low_);
    weigh_rows(weights, group_, values, From{begin}, all_ - begin, sums_ + i * group_ * padded_);
  }

  void finish_sums(int i, const KvRows& values, float* out) {
    const int tail = tail_of(i), own = end_of(i) - tail;
    const int32_t* path = paths_ + i * int64_t(high_ - low_);
    const float* weights = scores_ + i * group_ * lds_ + (tail - low_);
    float* sums = sums_ + i * group_ * padded_;
    weigh_rows(weights, group_, values, Along{path}, own, sums);
    for (int h = 0; h < group_; h++) {
      const vf inverse = set1(inverses_[i * group_ + h]);
      for (int j = 0; j < d_; j += LANES) {
        store_some(out + h * d_ + j, mul(load(sums + h * padded_ + j), inverse), d_ - j);
      }
    }
  }

  const RowTable& table_;
  const RowBlock& block_;
  const int window_, d_, padded_, group_;
  int low_, high_, common_;  // positions low_ .. low_ + common_ - 1 are the same slots for all rows
  int all_;                  // and those of them from here on are attended by all
  int64_t lds_;
  float *tile_, *queries_, *sums_, *inverses_, *scores_;  // decoded rows, [n, padded] twice, [n], [n, lds]
  int32_t* paths_;                                        // [rows, high - low]: own slots of each row
};

}  // namespace quantspec
