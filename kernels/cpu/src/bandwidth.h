// What the machine can do at most: reading memory, and multiplying bytes. The bench holds the kernels against these.
//
// Probes bring their own threads, pinned to a core each and spinning, so that neither a scheduler nor a pool stands
// between the figure and the machine.
#pragma once

#include <thread>
#include <vector>

#include "linear.h"
#include "pool.h"

namespace quantspec {

// Binds the calling thread to the `index`-th of the cores that the process may use.
inline void pin(int index) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  const int count = CPU_COUNT(&allowed);
  if (count == 0) return;
  index %= count;
  for (int core = 0; core < CPU_SETSIZE; core++) {
    if (!CPU_ISSET(core, &allowed) || index-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
#else
  (void)index;
#endif
}

// Runs body(thread, repeat) on all threads at once, `repeats` times: the least seconds from the first start to the last
// end. Each thread reads the clock itself: one that is held up at the start must not make the others' work look short.
template <class Body>
double least_seconds(int threads, int repeats, Body&& body) {
  using Clock = std::chrono::steady_clock;
  struct alignas(64) Span {
    Clock::time_point start, end;
  };
  std::vector<Span> spans(threads);
  std::atomic<int> arrived{0};
  double best = 1e30;
  const auto work = [&](int thread) {
    pin(thread);
    int expected = 0;
    const auto meet = [&] {
      expected += threads;
      arrived.fetch_add(1);
      for (int spins = 0; arrived.load(std::memory_order_acquire) < expected; spins++) {
        relax();
        if (spins > 10000) sched_yield();  // fewer cores than threads
      }
    };
    for (int repeat = 0; repeat < repeats; repeat++) {
      meet();
      spans[thread].start = Clock::now();
      body(thread, repeat);
      spans[thread].end = Clock::now();
      meet();
      if (thread != 0) continue;
      Span whole = spans[0];
      for (const Span& span : spans) {
        if (span.start < whole.start) whole.start = span.start;
        if (span.end > whole.end) whole.end = span.end;
      }
      const double seconds = std::chrono::duration<double>(whole.end - whole.start).count();
      if (seconds < best) best = seconds;
    }
  };
  std::vector<std::thread> crew;
  for (int thread = 0; thread < threads; thread++) crew.emplace_back(work, thread);
  for (std::thread& one : crew) one.join();
  return best;
}

// Reads `bytes`, a multiple of 256, and returns a sum of them: four cache lines a step, an accumulator each.
template <bool PREFETCH>
inline vi read_all(const uint8_t* from, int64_t bytes, int distance) {
  vi sum[4] = {set1(0), set1(0), set1(0), set1(0)};
  for (const uint8_t *at = from, *end = from + bytes; at < end; at += 256) {
    for (int line = 0; line < 4; line++) {
      if (PREFETCH) prefetch(at + distance + 64 * line);
      const int32_t* words = reinterpret_cast<const int32_t*>(at + 64 * line);
      sum[line] = add(sum[line], add(load(words), load(words + LANES)));
    }
  }
  return add(add(sum[0], sum[1]), add(sum[2], sum[3]));
}

#if defined(__AVX512BW__)
using PeakVector = __m512i;
inline PeakVector peak_start(int32_t x) { return _mm512_set1_epi32(x); }
#if defined(__AVX512VNNI__)
inline PeakVector peak_step(PeakVector sum, PeakVector x) { return _mm512_dpbusd_epi32(sum, x, x); }
#else
inline PeakVector peak_step(PeakVector sum, PeakVector x) { return _mm512_maddubs_epi16(sum, x); }
#endif
#elif defined(QS_AVX2)
using PeakVector = __m256i;
inline PeakVector peak_start(int32_t x) { return _mm256_set1_epi32(x); }
inline PeakVector peak_step(PeakVector sum, PeakVector x) { return _mm256_maddubs_epi16(sum, x); }
#endif

}  // namespace quantspec

extern "C" {

// Best GB/s (10^9) at which `threads` threads, each with its own share, read a segment of the `bytes` bytes at `buffer`
// (64-byte aligned), fetching `distance` bytes ahead (0: leave it to the processor). Every repeat reads the next
// segment, of 16 MB: too short to be disturbed each time on a busy machine, and out of the caches when its turn comes
// again.
QS_EXPORT double qs_read_bandwidth(const uint8_t* buffer, int64_t bytes, int threads, int distance, int repeats) {
  const int64_t segment = bytes < (16 << 20) ? bytes : 16 << 20, share = segment / threads / 256 * 256;
  const int64_t segments = bytes / segment;
  const double seconds = quantspec::least_seconds(threads, repeats, [&](int thread, int repeat) {
    const uint8_t* from = buffer + repeat % segments * segment + thread * share;
    const quantspec::vi sum =
        distance > 0 ? quantspec::read_all<true>(from, share, distance) : quantspec::read_all<false>(from, share, 0);
    asm volatile("" : : "m"(sum));  // or nobody would need the sum
  });
  return share * threads / seconds * 1e-9;
}

// Multiply-adds of bytes per second on `threads` cores together, of the integer dot instruction alone: independent
// chains of it in registers. 0 where the kernels have none.
QS_EXPORT double qs_peak_macs(int threads, int repeats) {
#if defined(QS_AVX2)
  constexpr int CHAINS = 12, ROUNDS = 1 << 15;
  const double seconds = quantspec::least_seconds(threads, repeats, [](int thread, int) {
    quantspec::PeakVector sums[CHAINS], x = quantspec::peak_start(0x01010101 + thread);
    for (int chain = 0; chain < CHAINS; chain++) sums[chain] = quantspec::peak_start(chain);
    for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 12
      for (int chain = 0; chain < CHAINS; chain++) sums[chain] = quantspec::peak_step(sums[chain], x);
    }
    for (const quantspec::PeakVector sum : sums) asm volatile("" : : "x"(sum));  // or nobody would need the sums
  });
  return double(sizeof(quantspec::PeakVector)) * CHAINS * ROUNDS * threads / seconds;
#else
  (void)threads, (void)repeats;
  return 0;
#endif
}

// Multiply-adds per second on `threads` cores together, of the int8 kernel's own inner loop for n rows of activations,
// its weights (one panel, a few kilobytes) and all else in the first-level cache.
QS_EXPORT double qs_tile_rate(const quantspec::Linear* w, int n, int threads, int repeats) {
  constexpr int ROUNDS = 100;
  std::vector<std::vector<float>> inputs(threads, std::vector<float>(quantspec::int8_row_bytes(*w) / 4 * n));
  std::vector<float> row(w->cols + 128);
  for (int k = 0; k < w->cols; k++) row[k] = float(k * 37 % 255 - 127);
  for (std::vector<float>& each : inputs) {
    for (int i = 0; i < n; i++) quantspec::quantize_row(*w, n, i, row.data(), each.data());
  }
  const double seconds = quantspec::least_seconds(threads, repeats, [&](int thread, int) {
    alignas(64) float sums[quantspec::BLOCK_ROWS * 32];
    for (int round = 0; round < ROUNDS; round++) {
      quantspec::panel_int8(*w, 0, inputs[thread].data(), n, sums);
      asm volatile("" : : "r"(sums) : "memory");
    }
  });
  return double(ROUNDS) * n * 32 * w->cols * threads / seconds;
}

}  // extern "C"
