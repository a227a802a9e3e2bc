// Rows of a cache, one key or value of one head each: as they are, or in 8 or 4 bits with a scale per 64 channels (the
// bytes of numerics/kv.py).
#pragma once

#include <vector>

#include "ops.h"

namespace quantspec {

constexpr int KV_GROUP = 64;  // channels that share a scale
constexpr int KV_STEP = 16;   // codes are padded to a multiple of this
constexpr int KV_TILE = 32;   // rows that are decoded at a time: they stay in the first-level cache

struct KvFormat {
  int bits, head_dim;  // 32: fp32
  int padded() const { return (head_dim + KV_STEP - 1) / KV_STEP * KV_STEP; }
  int groups() const { return (head_dim + KV_GROUP - 1) / KV_GROUP; }
  int code_bytes() const { return padded() * bits / 8; }
  int64_t row_bytes() const { return bits == 32 ? 4 * head_dim : code_bytes() + 4 * groups(); }
  int64_t tile_floats() const { return bits == 32 ? 0 : KV_TILE * int64_t(padded()); }
};

// The scale of `count` values; NaN where one of them is not finite.
inline float kv_scale(const float* x, int count, float levels) {
  vf most = set1(0.0f), check = set1(0.0f);
  for (int j = 0; j < count; j += LANES) {
    const vf value = load_some(x + j, count - j);
    most = max(abs(value), most);
    check = fma(value, set1(0.0f), check);  // zero, or not a number
  }
  alignas(32) float lanes[LANES];
  store(lanes, most);
  float peak = lanes[0];
  for (int j = 1; j < LANES; j++) peak = lanes[j] > peak ? lanes[j] : peak;
  return sum_lanes(check) == 0 ? peak / levels : NAN;
}

inline void kv_encode(const KvFormat& format, const float* x, uint8_t* row) {
  const int d = format.head_dim, half = 1 << (format.bits - 1);
  if (format.bits == 32) {
    std::memcpy(row, x, sizeof(float) * d);
    return;
  }
  uint8_t* scales = row + format.code_bytes();
  float scale = 0, step = 1;
  const auto code = [&](int j) {
    const vf clipped = min(max(div(load_some(x + j, d - j), set1(step)), set1(float(-half))), set1(float(half - 1)));
    return add(to_int(clipped), set1(half));
  };
  for (int j = 0; j < format.padded(); j += KV_STEP) {
    if (j % KV_GROUP == 0) {
      scale = kv_scale(x + j, d - j < KV_GROUP ? d - j : KV_GROUP, float(half) - 0.5f);
      step = scale > 0 ? scale : 1.0f;
      std::memcpy(scales + j / KV_GROUP * sizeof scale, &scale, sizeof scale);
    }
    const vi low = code(j), high = code(j + LANES);
    if (format.bits == 8) {
      store_u8(low, row + j);
      store_u8(high, row + j + LANES);
    } else {
      store_u8(bit_or(low, shift_left(high, 4)), row + j / 2);
    }
  }
}

// A row of 8 or 4-bit codes to out [padded].
template <int BITS>
inline void kv_decode(const KvFormat& format, const uint8_t* row, float* out) {
  const uint8_t* scales = row + format.code_bytes();
  const int padded = format.padded();
  vf scale = set1(0.0f), offset = scale;
  for (int j = 0; j < padded; j += KV_STEP) {
    if (j % KV_GROUP == 0) {
      float stored;
      std::memcpy(&stored, scales + j / KV_GROUP * sizeof stored, sizeof stored);
      // (code - half) * scale, rounded once: half is a power of two, so its product with the scale is exact.
      scale = set1(stored), offset = set1(-float(1 << (BITS - 1)) * stored);
    }
    const vi first = load_u8(row + j * BITS / 8);
    const vi low = BITS == 8 ? first : bit_and(first, set1(15));
    const vi high = BITS == 8 ? load_u8(row + j + LANES) : shift_right(first, 4);
    store(out + j, fma(to_float(low), scale, offset));
    store(out + j + LANES, fma(to_float(high), scale, offset));
  }
}

// Keys or values of one sequence, layer and key-value head, slot by slot.
struct KvRows {
  KvFormat format;
  const uint8_t* first;
};

// Calls use(first, count, at) for runs of the rows slot(0) .. slot(count - 1), in order; at(i) points to the floats of
// the run's row i. `tile` has room for `tile_floats`.
template <class Slot, class Use>
inline void kv_runs(const KvRows& rows, Slot&& slot, int count, float* tile, Use&& use) {
  const KvFormat& format = rows.format;
  const int64_t bytes = format.row_bytes();
  const auto row = [&](int i) { return rows.first + slot(i) * bytes; };
  if (format.bits == 32) {
    use(0, count, [=](int i) { return reinterpret_cast<const float*>(row(i)); });
    return;
  }
  const int padded = format.padded();
  for (int first = 0; first < count; first += KV_TILE) {
    const int now = count - first < KV_TILE ? count - first : KV_TILE;
    for (int i = 0; i < now; i++) {
      if (format.bits == 8) {
        kv_decode<8>(format, row(first + i), tile + i * padded);
      } else {
        kv_decode<4>(format, row(first + i), tile + i * padded);
      }
    }
    use(first, now, [=](int i) -> const float* { return tile + i * padded; });
  }
}

}  // namespace quantspec

extern "C" {

// The two below are for tests: n rows [n, head_dim] to bytes and back.
QS_EXPORT void qs_kv_encode(const float* x, int n, int bits, int head_dim, uint8_t* rows) {
  const quantspec::KvFormat format{bits, head_dim};
  for (int i = 0; i < n; i++) quantspec::kv_encode(format, x + int64_t(i) * head_dim, rows + i * format.row_bytes());
}

QS_EXPORT void qs_kv_decode(const uint8_t* rows, int n, int bits, int head_dim, float* x) {
  const quantspec::KvFormat format{bits, head_dim};
  std::vector<float> tile(format.tile_floats());
  quantspec::kv_runs(
      {format, rows}, [](int i) { return i; }, n, tile.data(),
      [&](int first, int count, auto at) {
        for (int i = 0; i < count; i++) std::memcpy(x + int64_t(first + i) * head_dim, at(i), sizeof(float) * head_dim);
      });
}

}  // extern "C"
