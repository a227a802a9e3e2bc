// The best entries of a row of logits and their log-probabilities, in two passes over the row.
#pragma once

#include "linear.h"
#include "ops.h"

namespace quantspec {

constexpr int SCAN = 8 * LANES;              // entries whose maximum says whether any of them can be among the best
constexpr int64_t WORTH_A_THREAD = 1 << 16;  // entries; about 20 us of work

// The k largest of x[size], descending, ties by ascending index; any k where one of x is not a number.
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

// The sum of those of masses[size], a multiple of LANES of them, that are at least `cut`.
inline float mass_from(const float* masses, int size, float cut) {
  float sums[LANES] = {};
  for (int i = 0; i < size; i += LANES) {
    for (int j = 0; j < LANES; j++) sums[j] += masses[i + j] >= cut ? masses[i + j] : 0.0f;
  }
  float sum = 0.0f;
  for (int j = 0; j < LANES; j++) sum += sums[j];
  return sum;
}

// The largest entries of x[size] that hold `share` of the mass of e^x, give or take a few at the cut, and of these the
// ones with at least `least` times the largest mass; in ascending order, with their ids. Returns how many.
inline int nucleus(const float* x, int size, float share, float least, int32_t* ids, float* values) {
  static thread_local Buffer buffer;
  const int padded = (size + LANES - 1) / LANES * LANES;
  float* masses = buffer.get<float>(padded);
  float peak = x[0];
  for (int i = 1; i < size; i++) peak = x[i] > peak ? x[i] : peak;
  for (int i = 0; i < size; i += LANES)
    store_some(masses + i, exp(sub(load_some(x + i, size - i), set1(peak))), size - i);
  for (int i = size; i < padded; i++) masses[i] = 0.0f;
  float low = 0.0f;
  if (share < 1.0f) {
    const float target = share * mass_from(masses, padded, 0.0f);
    float log_cut = -20.0f;  // whatever lies below that is as good as nothing
    for (float step = 10.0f; step > 0.004f; step *= 0.5f) {
      if (mass_from(masses, padded, std::exp(log_cut + step)) >= target) log_cut += step;
    }
    low = std::exp(log_cut);
  }
  const float cut = low > least ? low : least;
  int count = 0;
  for (int i = 0; i < size; i++) {
    if (!(masses[i] >= cut)) continue;
    ids[count] = i;
    values[count++] = x[i];
  }
  return count;
}

}  // namespace quantspec

extern "C" {

// `nucleus` of each row of x [n, size], row after row: counts [n]; ids and values have room for n * size. Returns a
// `status_of`.
QS_EXPORT int qs_nucleus_rows(const float* x, int n, int size, float share, float least, int64_t* counts, int32_t* ids,
                              float* values) {
  return quantspec::status_of([&] {
    int64_t all = 0;
    for (int i = 0; i < n; i++) {
      counts[i] = quantspec::nucleus(x + int64_t(i) * size, size, share, least, ids + all, values + all);
      all += counts[i];
    }
  });
}

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
