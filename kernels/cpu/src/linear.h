// Packed linear layers: how their weights lie in memory, and y = x W^T over all threads.
//
// A weight [N, K] is cut into panels of 32 output rows, which lie one after the other, N filled up with zeros. Within
// a panel, quantized formats go group by group along K (K filled up to whole groups):
//
//   scales of the 32 rows | zero points, one byte a row, if asymmetric (64 bytes) | codes
//
// Codes of q4 take 8 values of k in a step of 128 bytes: row r's 4 bytes at 4 r, byte j with the code of k = j in its
// low and of k = 4 + j in its high nibble, unsigned, q + 8. Codes of q8 are signed bytes and take 2 values of k in a
// step of 64 bytes, row r's at 2 r. Zero points are unsigned, z + 8 or z + 128. Dense formats go k by k, the 32 rows'
// values together.
//
// Columns may lie in an activation order (GPTQ's desc_act): inputs are brought into it before anything else is done to
// them, so that all else is as without one.
#pragma once

#include <cstdlib>

#include "pool.h"
#include "simd.h"

namespace quantspec {

enum Format : int32_t { Q4 = 0, Q8 = 1, F32 = 2, F16 = 3, BF16 = 4 };

struct Linear {  // mirrored in packed.py
  const uint8_t* panels;
  const float* bias;     // [rows], or null
  const int32_t* order;  // [cols], or null: column j belongs to input order[j]
  int32_t rows, cols;
  int32_t format;      // a Format
  int32_t group;       // 32, 64 or 128; 0 in dense formats
  int32_t scale_type;  // F32, F16 or BF16
  int32_t asymmetric;

  bool dense() const { return format >= F32; }
  int panel_count() const { return (rows + 31) / 32; }
  int groups() const { return (cols + group - 1) / group; }
  int64_t scale_bytes() const { return scale_type == F32 ? 128 : 64; }
  int64_t codes_offset() const { return scale_bytes() + (asymmetric ? 64 : 0); }
  int64_t group_bytes() const { return codes_offset() + int64_t(group) * (format == Q8 ? 32 : 16); }
  int64_t panel_bytes() const {
    return dense() ? int64_t(cols) * (format == F32 ? 128 : 64) : groups() * group_bytes();
  }
};

inline vf load_as(int type, const void* values, int index) {  // eight values from `index` on
  if (type == F32) return load(static_cast<const float*>(values) + index);
  const uint16_t* half = static_cast<const uint16_t*>(values) + index;
  return type == F16 ? load_f16(half) : load_bf16(half);
}

// Memory that is kept from call to call and grows by half at least, or an ever longer context would move it every few
// tokens. Aligned to a cache line. Throws std::bad_alloc.
class Buffer {
 public:
  ~Buffer() { std::free(memory_); }
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (bytes > size_) {
      const size_t size = (std::max(bytes, size_ + size_ / 2) + 63) / 64 * 64;
      std::free(memory_);
      memory_ = std::aligned_alloc(64, size);
      size_ = memory_ ? size : 0;
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Rows are taken in blocks whose sums stay in cache, and blocks in tiles that share each weight in registers.
constexpr int BLOCK_ROWS = 64;

// `count` rows in as few tiles of at most `most` as there can be, as even as they can be.
struct Tiles {
  int count, longer, width;  // the first `longer` tiles have a row more than `width`
  Tiles(int rows, int most) : count((rows + most - 1) / most) {
    width = rows / count;
    longer = rows % count;
  }
  int begin(int tile) const { return tile * width + (tile < longer ? tile : longer); }
  int size(int tile) const { return width + (tile < longer); }
  int of(int row) const {
    const int bound = longer * (width + 1);
    return row < bound ? row / (width + 1) : longer + (row - bound) / width;
  }
};

// Panels that a thread claims at once: a few claims a thread, so that one that is held up leaves its rest to the
// others.
inline int panel_chunk(int panels) {
  const int claims = num_threads() * 8;
  return panels > claims ? panels / claims : 1;
}

// The sums of one panel go out: y[n, N] (+)= sums[n, 32] + bias.
inline void finish_panel(const Linear& w, int panel, int n, const float* sums, float* y, int64_t ldy, bool accumulate) {
  const int first = panel * 32, count = w.rows - first < 32 ? w.rows - first : 32;
  for (int i = 0; i < n; i++) {
    float* out = y + i * ldy + first;
    const float* sum = sums + i * 32;
    if (count == 32) {
      for (int r = 0; r < 32; r += LANES) {
        vf value = load(sum + r);
        if (w.bias) value = add(value, load(w.bias + first + r));
        store(out + r, accumulate ? add(load(out + r), value) : value);
      }
      continue;
    }
    for (int r = 0; r < count; r++) {
      const float value = w.bias ? sum[r] + w.bias[first + r] : sum[r];
      out[r] = accumulate ? out[r] + value : value;
    }
  }
}

}  // namespace quantspec

#include "gemm_float.h"
#include "gemm_int8.h"

namespace quantspec {

constexpr int64_t WORTH_THREADS = 1 << 21;  // multiply-adds: some 20 us of one core

// y[n, N] = (accumulate ? y : 0) + x W^T + bias. `source(i, x_k)` writes row i's K inputs. Rows of y depend on their
// own input alone, to the bit, whatever n and the number of threads. `int8`: quantized weights meet int8 activations.
template <class Source>
void matmul(const Linear& w, int n, Source&& source, float* y, int64_t ldy, bool accumulate, bool int8) {
  static thread_local Buffer buffer;
  const Alone alone(int64_t(n) * w.rows * w.cols <= WORTH_THREADS);
  const bool integers = int8 && !w.dense();
  const int64_t row_values = integers ? int8_row_bytes(w) / 4 : float_row_values(w);
  float* inputs = buffer.get<float>(row_values * n);
  parallel_for(n, [&](int i) {
    static thread_local Buffer row_buffer;
    const int64_t room = w.cols + 128;
    float* row = row_buffer.get<float>(w.order ? 2 * room : room);
    source(i, row);
    if (w.order) {
      for (int k = 0; k < w.cols; k++) row[room + k] = row[w.order[k]];
      row += room;
    }
    if (integers) {
      quantize_row(w, n, i, row, inputs);
    } else {
      spread_row(w, n, i, row, inputs);
    }
  });
  const int panels = w.panel_count(), chunk = panel_chunk(panels);
  parallel_for((panels + chunk - 1) / chunk, [&](int c) {
    alignas(64) float sums[BLOCK_ROWS * 32];
    for (int panel = c * chunk; panel < panels && panel < (c + 1) * chunk; panel++) {
      for (int first = 0; first < n; first += BLOCK_ROWS) {
        const int count = n - first < BLOCK_ROWS ? n - first : BLOCK_ROWS;
        if (integers) {
          panel_int8(w, panel, inputs + row_values * first, count, sums);
        } else {
          panel_float(w, panel, inputs + row_values * first, count, sums);
        }
        finish_panel(w, panel, count, sums, y + first * ldy, ldy, accumulate);
      }
    }
  });
}

}  // namespace quantspec
