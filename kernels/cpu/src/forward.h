// A decoder-only model in one call: embedding, layers, taps and head, for ragged rows of several sequences.
#pragma once

#include "attention.h"
#include "linear.h"
#include "ops.h"
#include "packing.h"

namespace quantspec {

struct Layer {
  const float *input_norm, *post_norm;  // [hidden]
  const float *q_norm, *k_norm;         // [head_dim], or null
  Linear qkv, o, gate_up, down;
  int32_t window;  // 0: attends everything
};

struct Model {
  const Layer* layers;
  const float* norm;
  Linear embedding, head;
  int32_t layer_count, hidden, inner, heads, kv_heads, head_dim;
  float eps;
  int32_t int8;
  int32_t kv_bits;  // of a KvFormat
};

struct Cache {  // of one sequence: rows [layers, 2 kv_heads, slots], all keys of a layer and then all values
  uint8_t* kv;
  int64_t layer_stride, head_stride;  // in bytes
};

struct TapTarget {  // the stream after a layer goes to out [n, hidden]; -1: embeddings; layer_count: final norm
  int64_t layer;
  float* out;
};

struct Rows {
  int32_t n, sequences, tap_count;
  const int32_t* numbers;  // of Batch: tokens, parents [n], seq_starts [b + 1], cached, num_logits [b]
  const Cache* caches;
  const TapTarget* taps;
  const float *cos, *sin;  // [positions, head_dim], the first half of sin negated
  float* logits;           // of the asked rows, one after the other
  double* seconds;         // [PARTS], to which the time of each part is added; or null
};

enum Part { EMBEDDING, QKV, ATTENTION, O, MLP, HEAD, PARTS };  // a norm counts to what it feeds; named in forward.py

// Rows are taken through the whole model in blocks, which bounds memory; earlier blocks are in the cache by then.
constexpr int FORWARD_ROWS = 128;
// Work below which waking other threads costs more than it saves: floats moved, and multiply-adds of attention.
constexpr int64_t SMALL_COPY = 32768, SMALL_ATTENTION = 32768;

class Forward {
 public:
  Forward(const Model& model, const Rows& rows, float* floats, int32_t* ints, RowBlock* blocks)
      : m_(model),
        r_(rows),
        shape_{model.heads, model.kv_heads, model.head_dim},
        format_{model.kv_bits, model.head_dim},
        blocks_(blocks) {
    const int n = rows.n;
    tokens_ = rows.numbers;
    table_ = {tokens_ + n, tokens_ + 2 * n, tokens_ + 2 * n + rows.sequences + 1, ints, ints + n, ints + 2 * n};
    logit_counts_ = table_.cached + rows.sequences;
    asked_ = ints + 3 * n;
    for (int s = 0; s < rows.sequences; s++) place_rows(s);
    const int64_t most = least(n, FORWARD_ROWS);
    x_ = floats;
    qkv_ = x_ + most * model.hidden;
    mixed_ = qkv_ + most * qkv_width();
    gate_up_ = mixed_ + most * q_width();
  }

  static int64_t floats(const Model& m, int n) {
    return least(n, FORWARD_ROWS) * (m.hidden + int64_t(2 * m.heads + 2 * m.kv_heads) * m.head_dim + 2 * m.inner);
  }

  void run() {
    took(PARTS);
    for (first_ = 0; first_ < r_.n; first_ += FORWARD_ROWS) {
      count_ = int(least(r_.n - first_, FORWARD_ROWS));
      divide_rows();
      run_block();
    }
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  int q_width() const { return m_.heads * m_.head_dim; }
  int qkv_width() const { return (m_.heads + 2 * m_.kv_heads) * m_.head_dim; }

  // The time since the last call went to `part`.
  void took(Part part) {
    if (r_.seconds == nullptr) return;
    const auto now = std::chrono::steady_clock::now();
    if (part != PARTS) r_.seconds[part] += std::chrono::duration<double>(now - since_).count();
    since_ = now;
  }

  // Positions and paths of one sequence's rows, and which of them get logits.
  void place_rows(int s) {
    const int start = table_.starts[s], end = table_.starts[s + 1];
    for (int row = start; row < end; row++) {
      const int parent = table_.parents[row], before = start + parent;
      table_.sequence[row] = s;
      table_.position[row] = parent < 0 ? table_.cached[s] : table_.position[before] + 1;
      table_.straight[row] = parent == row - start - 1 && (parent < 0 || table_.straight[before]);
      asked_[row] = row >= end - logit_counts_[s];
    }
  }

  // Rows of one sequence that share loaded keys and values, a few at a time.
  void divide_rows() {
    const int group = shape_.group(), most = group >= QUERIES ? 1 : QUERIES / group;
    block_count_ = 0;
    for (int row = first_; row < first_ + count_;) {
      const int s = table_.sequence[row], end = int(least(table_.starts[s + 1], first_ + count_));
      RowBlock block{row, int(least(end - row, most)), s, table_.cached[s]};
      if (table_.straight[row + block.count - 1]) block.shared = table_.position[row] + 1;
      blocks_[block_count_++] = block;
      row += block.count;
    }
  }

  void run_block() {
    parallel_for(count_, [&](int i) {
      embed_rows(m_.embedding, tokens_ + first_ + i, 1, x_ + int64_t(i) * m_.hidden, m_.hidden);
    });
    tap(-1);
    took(EMBEDDING);
    for (int i = 0; i < m_.layer_count; i++) {
      run_layer(i);
      tap(i);
    }
    for (int t = 0; t < r_.tap_count; t++) {
      if (r_.taps[t].layer != m_.layer_count) continue;
      for (int i = 0; i < count_; i++) normed(m_.norm, i, r_.taps[t].out + int64_t(first_ + i) * m_.hidden);
    }
    run_head();
  }

  void tap(int layer) {
    for (int t = 0; t < r_.tap_count; t++) {
      if (r_.taps[t].layer != layer) continue;
      std::memcpy(r_.taps[t].out + int64_t(first_) * m_.hidden, x_, sizeof(float) * count_ * m_.hidden);
    }
  }

  void normed(const float* weight, int i, float* out) const {
    rms_norm(x_ + int64_t(i) * m_.hidden, weight, m_.hidden, m_.eps, out);
  }

  void run_layer(int index) {
    const Layer& layer = m_.layers[index];
    const bool int8 = m_.int8 != 0;
    const int n = count_, hidden = m_.hidden, inner = m_.inner, width = q_width();
    const auto input = [&](int i, float* x) { normed(layer.input_norm, i, x); };
    matmul(layer.qkv, n, input, qkv_, qkv_width(), false, int8);
    took(QKV);
    const int chunks = int64_t(n) * qkv_width() < SMALL_COPY ? 1 : n;
    parallel_for(chunks, [&](int chunk) {
      for (int i = n * chunk / chunks; i < n * (chunk + 1) / chunks; i++) place_heads(layer, index, i);
    });
    attend_all(layer, index);
    took(ATTENTION);
    const auto mixed = [&](int i, float* x) { std::memcpy(x, mixed_ + int64_t(i) * width, sizeof(float) * width); };
    matmul(layer.o, n, mixed, x_, hidden, true, int8);
    took(O);
    const auto middle = [&](int i, float* x) { normed(layer.post_norm, i, x); };
    matmul(layer.gate_up, n, middle, gate_up_, 2 * inner, false, int8);
    const auto gated = [&](int i, float* x) { swiglu(gate_up_ + int64_t(i) * 2 * inner, inner, x); };
    matmul(layer.down, n, gated, x_, hidden, true, int8);
    took(MLP);
  }

  // A row's queries are normed, rotated and scaled in place; its keys and values go to their cache slot.
  void place_heads(const Layer& layer, int index, int i) {
    const int row = first_ + i, d = m_.head_dim;
    const Cache& cache = r_.caches[table_.sequence[row]];
    float* head = qkv_ + int64_t(i) * qkv_width();
    uint8_t* slot = cache.kv + index * cache.layer_stride + table_.slot(row) * format_.row_bytes();
    const float *cos = r_.cos + int64_t(table_.position[row]) * d, *sin = r_.sin + int64_t(table_.position[row]) * d;
    const float scale = 1.0f / std::sqrt(float(d));
    for (int h = 0; h < m_.heads; h++, head += d) {
      if (layer.q_norm) rms_norm(head, layer.q_norm, d, m_.eps, head);
      rotate(head, cos, sin, d / 2, scale, head);
    }
    for (int h = 0; h < m_.kv_heads; h++, head += d) {
      if (layer.k_norm) rms_norm(head, layer.k_norm, d, m_.eps, head);
      rotate(head, cos, sin, d / 2, 1.0f, head);
      kv_encode(format_, head, slot + h * cache.head_stride);
    }
    for (int h = 0; h < m_.kv_heads; h++, head += d) {
      kv_encode(format_, head, slot + (m_.kv_heads + h) * cache.head_stride);
    }
  }

  void attend_all(const Layer& layer, int index) {
    int64_t work = 0;
    for (int i = 0; i < count_; i++) work += int64_t(table_.position[first_ + i] + 1) * q_width();
    const int tasks = block_count_ * m_.kv_heads;
    const int chunks = int(least(tasks, 1 + work / SMALL_ATTENTION));
    parallel_for(chunks, [&](int chunk) {
      for (int task = int(int64_t(tasks) * chunk / chunks); task < int64_t(tasks) * (chunk + 1) / chunks; task++) {
        const int h = task / block_count_, offset = h * shape_.group() * m_.head_dim;
        const RowBlock& block = blocks_[task % block_count_];
        const Cache& cache = r_.caches[block.sequence];
        const uint8_t* keys = cache.kv + index * cache.layer_stride + h * cache.head_stride;
        const int64_t i = block.first - first_;
        BlockAttention(shape_, table_, block, layer.window)
            .run({format_, keys}, {format_, keys + m_.kv_heads * cache.head_stride}, qkv_ + i * qkv_width() + offset,
                 qkv_width(), mixed_ + i * q_width() + offset, q_width());
      }
    });
  }

  // Logits of the asked rows of this block, which follow those of earlier blocks.
  void run_head() {
    int32_t* asked = asked_ + first_;  // flags become a list of rows, in place
    int count = 0;
    for (int i = 0; i < count_; i++) {
      if (asked[i]) asked[count++] = i;
    }
    if (count == 0) return;
    float* out = r_.logits + logits_done_ * m_.head.rows;
    const auto last = [&](int i, float* x) { normed(m_.norm, asked[i], x); };
    matmul(m_.head, count, last, out, m_.head.rows, false, m_.int8 != 0);
    logits_done_ += count;
    took(HEAD);
  }

  const Model& m_;
  const Rows& r_;
  const Shape shape_;
  const KvFormat format_;
  const int32_t *tokens_, *logit_counts_;
  RowTable table_;
  RowBlock* blocks_;
  int32_t* asked_;
  float *x_, *qkv_, *mixed_, *gate_up_;
  int first_ = 0, count_ = 0, block_count_ = 0;
  int64_t logits_done_ = 0;
  std::chrono::steady_clock::time_point since_;
};

}  // namespace quantspec

extern "C" {

// Returns a `status_of`.
QS_EXPORT int qs_forward(const quantspec::Model* model, const quantspec::Rows* rows) {
  using namespace quantspec;
  static thread_local Buffer floats, ints, blocks;
  return status_of([&] {
    Forward(*model, *rows, floats.get<float>(Forward::floats(*model, rows->n)), ints.get<int32_t>(4 * int64_t(rows->n)),
            blocks.get<RowBlock>(FORWARD_ROWS))
        .run();
  });
}

}  // extern "C"
