// From plain weights to panels (see linear.h), and single rows back.
#pragma once

#include "linear.h"

namespace quantspec {

constexpr int MATMUL_ROWS = 256;  // that a single product takes at a time, which bounds memory

inline uint8_t* group_at(const Linear& w, int row, int g) {
  return const_cast<uint8_t*>(w.panels) + row / 32 * w.panel_bytes() + g * w.group_bytes();
}

inline float scalar_as(int type, const void* values, int index) {
  alignas(32) float eight[LANES];
  alignas(32) uint8_t bytes[32] = {};
  const int size = type == F32 ? 4 : 2;
  std::memcpy(bytes, static_cast<const uint8_t*>(values) + int64_t(index) * size, size);
  store(eight, load_as(type, bytes, 0));
  return eight[0];
}

// One row of codes int8 [K] with scales [source groups], as stored, and zero points int8 (null: symmetric). Rows past
// the last are given none and get scale 0.
inline void pack_row(const Linear& w, int row, const int8_t* codes, const uint8_t* scales, const int8_t* zeros,
                     int source_group) {
  const int bias = w.format == Q8 ? 128 : 8, size = w.scale_type == F32 ? 4 : 2, r = row % 32;
  for (int g = 0; g < w.groups(); g++) {
    uint8_t* group = group_at(w, row, g);
    const int source = g * w.group / source_group;
    std::memset(group + r * size, 0, size);
    if (scales) std::memcpy(group + r * size, scales + source * size, size);
    if (w.asymmetric) {
      if (r == 0) std::memset(group + w.scale_bytes() + 32, 0, 32);
      group[w.scale_bytes() + r] = uint8_t(bias + (zeros ? zeros[source] : 0));
    }
    const auto code = [&](int k) { return codes && g * w.group + k < w.cols ? codes[g * w.group + k] : 0; };
    uint8_t* out = group + w.codes_offset();
    if (w.format == Q8) {
      for (int k = 0; k < w.group; k++) out[k / 2 * 64 + r * 2 + k % 2] = uint8_t(code(k));
      continue;
    }
    for (int k = 0; k < w.group; k += 8) {
      for (int j = 0; j < 4; j++) out[k * 16 + r * 4 + j] = uint8_t((code(k + j) + 8) | (code(k + j + 4) + 8) << 4);
    }
  }
}

// Row `row` of the weight, dequantized: [K], by inputs.
inline void unpack_row(const Linear& w, int row, float* out) {
  const int r = row % 32, size = w.format == F32 ? 4 : 2;
  if (w.dense()) {
    const uint8_t* panel = w.panels + row / 32 * w.panel_bytes() + r * size;
    for (int k = 0; k < w.cols; k++) out[k] = scalar_as(w.format, panel + int64_t(k) * 32 * size, 0);
    return;
  }
  for (int g = 0; g < w.groups(); g++) {
    const uint8_t* group = group_at(w, row, g);
    const float scale = scalar_as(w.scale_type, group, r);
    const int origin = w.format == Q8 ? 128 : 8, zero = (w.asymmetric ? group[w.scale_bytes() + r] : origin) - origin;
    const uint8_t* codes = group + w.codes_offset();
    const int end = w.cols < (g + 1) * w.group ? w.cols : (g + 1) * w.group;
    for (int k = g * w.group; k < end; k++) {
      const int at = k % w.group, j = at % 8;
      const int code = w.format == Q8 ? int8_t(codes[at / 2 * 64 + r * 2 + at % 2])
                                      : (codes[at / 8 * 128 + r * 4 + j % 4] >> (j < 4 ? 0 : 4) & 15) - 8;
      out[w.order ? w.order[k] : k] = float(code - zero) * scale;
    }
  }
}

// Embeddings from the same packed tensor as an LM head: out[n, K].
inline void embed_rows(const Linear& w, const int32_t* ids, int n, float* out, int64_t ldo) {
  for (int i = 0; i < n; i++) unpack_row(w, ids[i], out + i * ldo);
}

}  // namespace quantspec

// codes int8 [N, K], scales [N, source_groups] of w's scale type, zeros int8 [N, source_groups] or null.
QS_EXPORT void qs_pack_quantized(const quantspec::Linear* w, const int8_t* codes, const uint8_t* scales,
                                 const int8_t* zeros, int source_group) {
  const int groups = (w->cols + source_group - 1) / source_group, size = w->scale_type == quantspec::F32 ? 4 : 2;
  quantspec::parallel_for(w->panel_count(), [&](int panel) {
    for (int row = panel * 32; row < panel * 32 + 32; row++) {
      const bool real = row < w->rows;
      quantspec::pack_row(*w, row, real ? codes + int64_t(row) * w->cols : nullptr,
                          real ? scales + int64_t(row) * groups * size : nullptr,
                          real && zeros ? zeros + int64_t(row) * groups : nullptr, source_group);
    }
  });
}

// values [N, K] of w's format.
QS_EXPORT void qs_pack_dense(const quantspec::Linear* w, const uint8_t* values) {
  const int size = w->format == quantspec::F32 ? 4 : 2;
  quantspec::parallel_for(w->panel_count(), [&](int panel) {
    uint8_t* out = const_cast<uint8_t*>(w->panels) + panel * w->panel_bytes();
    for (int r = 0; r < 32; r++) {
      const int row = panel * 32 + r;
      for (int k = 0; k < w->cols; k++) {
        uint8_t* to = out + (int64_t(k) * 32 + r) * size;
        if (row < w->rows) {
          std::memcpy(to, values + (int64_t(row) * w->cols + k) * size, size);
        } else {
          std::memset(to, 0, size);
        }
      }
    }
  });
}

// y[n, N] = (accumulate ? y : 0) + x[n, K] W^T + bias. Returns a `status_of`.
QS_EXPORT int qs_matmul(const quantspec::Linear* w, const float* x, int64_t ldx, int n, float* y, int64_t ldy,
                        int accumulate, int int8) {
  return quantspec::status_of([&] {
    for (int first = 0; first < n; first += quantspec::MATMUL_ROWS) {
      const auto source = [&](int i, float* row) { std::memcpy(row, x + (first + i) * ldx, sizeof(float) * w->cols); };
      const int count = std::min(n - first, quantspec::MATMUL_ROWS);
      quantspec::matmul(*w, count, source, y + first * ldy, ldy, accumulate != 0, int8 != 0);
    }
  });
}

QS_EXPORT void qs_embed(const quantspec::Linear* w, const int32_t* ids, int n, float* out, int64_t ldo) {
  quantspec::embed_rows(*w, ids, n, out, ldo);
}
