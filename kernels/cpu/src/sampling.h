// The best entries of a row of logits and their log-probabilities, in two passes over the row.
#pragma once

#include "ops.h"
#include "pool.h"

namespace quantspec {

constexpr int SCAN = 8 * LANES;               // entries whose maximum says whether any of them can be among the best
constexpr int64_t WORTH_A_THREAD = 1 << 16;  // entries; about 20 us of work

// The k largest of x[size], descending, ties by ascending index. NaN is never among them.
inline void best_entries(const float* x, int size, int k, int32_t* ids, float* values) {
  int found = 0;
  const auto offer = [&](int i) {
    if (found == k && !(x[i] > values[k - 1])) return;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && x[i] > values[at - 1]; at--) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x[i];
    ids[at] = i;
  };
  int i = 0;
  for (; i + SCAN <= size; i += SCAN) {
    if (found == k) {
      vf most = load(x + i);
      for (int j = LANES; j < SCAN; j += LANES) most = max(load(x + i + j), most);
      alignas(32) float lanes[LANES];
      store(lanes, most);
      bool any = false;
      for (int j = 0; j < LANES; j++) any |= lanes[j] > values[k - 1];
      if (!any) continue;
    }
    for (int j = i; j < i + SCAN; j++) offer(j);
  }
  for (; i < size; i++) offer(i);
}

// log(sum(exp(x))), given the maximum of x[size]. NaN where any entry is.
inline float log_sum_exp(const float* x, int size, float peak) {
  vf sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES) {
    for (int j = 0; j < 4; j++) sums[j] = add(sums[j], exp(sub(load(x + i + j * LANES), set1(peak))));
  }
  float sum = sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < size; i++) sum += std::exp(x[i] - peak);
  return peak + std::log(sum);
}

}  // namespace quantspec

extern "C" {

// Per row of x [n, size] the k best entries: ids [n, k] and log_softmax values [n, k]. 1 <= k <= size.
QS_EXPORT void qs_best_rows(const float* x, int n, int size, int k, int32_t* ids, float* scores) {
  const auto row = [=](int i) {
    const float* from = x + int64_t(i) * size;
    float* values = scores + int64_t(i) * k;
    quantspec::best_entries(from, size, k, ids + int64_t(i) * k, values);
    const float total = quantspec::log_sum_exp(from, size, values[0]);
    for (int j = 0; j < k; j++) values[j] -= total;
  };
  if (int64_t(n) * size >= quantspec::WORTH_A_THREAD) {
    quantspec::parallel_for(n, row);
  } else {
    for (int i = 0; i < n; i++) row(i);
  }
}

}  // extern "C"
