// A CUDA device on one CPU core, in place of kernels/cuda/src/ptx.h: a block's threads are fibers that take turns.
//
// It is stricter than a GPU. Copies are made as late as the program allows, and their target holds NaN until then; a
// warp's fragments are placed by the PTX manual's tables alone; a barrier that some thread never reaches is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#define __device__

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulation {

struct Index {
  int x;
};
struct Copy {
  void* to;
  const void* from;
  int bytes, zeros;  // which follow them
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  bool waited;         // for the grids before this one
  const int* watched;  // it sleeps until this counter is no longer `seen`
  int seen;
  std::vector<std::vector<Copy>> groups;  // committed copies, and those that are not yet
};
struct Meeting {  // of `size` threads
  int size, here = 0, count = 0;
};
struct WarpState {
  Meeting meeting{32};
  uint32_t a[32][4], b[32][2];
};
struct Bulk {  // an mbarrier
  int phase = 0, expected = 0, count = 0;
  std::vector<Copy> copies;
};

inline std::vector<Fiber> fibers;
inline std::vector<WarpState> warps;
inline std::map<const void*, Bulk> barriers;
inline Meeting block_meeting;
inline ucontext_t scheduler;
inline int running;

inline void sleep_until_changed(const int& counter, int seen) {
  Fiber& self = fibers[running];
  self.watched = &counter;
  self.seen = seen;
  swapcontext(&self.context, &scheduler);
}

inline void meet(Meeting& meeting) {
  const int count = meeting.count;
  if (++meeting.here == meeting.size) {
    meeting.here = 0;
    meeting.count++;
  } else {
    sleep_until_changed(meeting.count, count);
  }
}

inline void begin_copy(std::vector<Copy>& copies, const Copy& copy) {
  const int size = copy.bytes + copy.zeros;
  if (uintptr_t(copy.to) % 16 || uintptr_t(copy.from) % 16 || size % 16) {
    std::fprintf(stderr, "a copy is not aligned to 16 bytes\n");
    std::abort();
  }
  std::memset(copy.to, 0xFF, size);
  copies.push_back(copy);
}

// What an earlier grid may still write or read is out of bounds until it has ended.
inline void require_wait() {
  if (!fibers[running].waited) {
    std::fprintf(stderr, "memory of an earlier grid was touched before it had ended\n");
    std::abort();
  }
}

inline void finish(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
  }
  copies.clear();
}

// Runs `body` as `threads` threads of one block, in random turns. False if they wait for each other forever.
template <class Body>
bool run_block(int threads, std::mt19937& random, Body& body) {
  static Body* current;
  current = &body;
  fibers.assign(threads, Fiber{});
  warps.assign(threads / 32, WarpState{});
  barriers.clear();
  block_meeting = Meeting{threads};
  std::vector<int> order(threads);
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    order[i] = i;
    fiber.stack.resize(64 << 10);
    fiber.groups.resize(1);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(
        &fiber.context,
        +[] {
          (*current)();
          require_wait();  // or this grid might end before an earlier one
          fibers[running].done = true;
        },
        0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    bool moved = false;
    std::shuffle(order.begin(), order.end(), random);
    for (const int i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done) continue;
      alive = true;
      if (fiber.watched && *fiber.watched == fiber.seen) continue;
      fiber.watched = nullptr;
      running = i;
      moved = true;
      swapcontext(&scheduler, &fiber.context);
    }
    if (alive && !moved) return false;
  }
  return true;
}

inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                    : std::ldexp(float(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}

inline uint16_t half_bits(double value) {  // to the nearest, ties to even
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isnan(value)) return 0x7FFF;
  if (size >= 65520) return sign | 0x7C00;
  if (size < std::ldexp(1.0, -14)) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
  const int exponent = std::ilogb(size);
  return sign | uint16_t(((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(size, 10 - exponent))));
}

inline float bfloat_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline uint16_t bfloat_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float value_of(uint16_t bits, bool bfloat) {
  static const std::vector<float> halves = [] {
    std::vector<float> all(65536);
    for (int i = 0; i < 65536; i++) all[i] = half_value(uint16_t(i));
    return all;
  }();
  return bfloat ? bfloat_value(bits) : halves[bits];
}

inline uint16_t part(uint32_t pair, int i) { return uint16_t(pair >> 16 * i); }

template <class F>
uint32_t each(F f) {
  return f(0) | uint32_t(f(1)) << 16;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16": element i of A lies at row g + 8 [i is 2, 3, 6 or 7], column
// 2 t + i % 2 + 8 [i >= 4]; element i of B at row 2 t + i % 2 + 8 [i >= 2], column g; element i of C at row
// g + 8 [i >= 2], column 2 t + i % 2; with g = lane / 4 and t = lane % 4.
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat) {
  const int lane = running % 32;
  WarpState& warp = warps[running / 32];
  std::copy(a, a + 4, warp.a[lane]);
  std::copy(b, b + 2, warp.b[lane]);
  meet(warp.meeting);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const int a_element = k % 2 + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0), b_element = k % 2 + (k >= 8 ? 2 : 0);
      const uint32_t a_pair = warp.a[row % 8 * 4 + k % 8 / 2][a_element / 2];
      const uint32_t b_pair = warp.b[column * 4 + k % 8 / 2][b_element / 2];
      c[i] += value_of(part(a_pair, a_element % 2), bfloat) * value_of(part(b_pair, b_element % 2), bfloat);
    }
  }
  meet(warp.meeting);
}

}  // namespace emulation

inline emulation::Index blockIdx, gridDim;
struct ThreadIndex {
  struct {
    operator int() const { return emulation::running; }
  } x;
};
inline ThreadIndex threadIdx;

inline void __syncthreads() { emulation::meet(emulation::block_meeting); }
inline void __threadfence() {}
inline int atomicAdd(int32_t* address, int value) {
  emulation::require_wait();
  *address += value;
  return *address - value;
}

namespace quantspec {

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

inline uint32_t half2_sub(uint32_t a, uint32_t b) {
  using namespace emulation;
  return each([&](int i) { return half_bits(double(half_value(part(a, i))) - half_value(part(b, i))); });
}

inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  using namespace emulation;
  return each([&](int i) {
    return half_bits(double(half_value(part(a, i))) * half_value(part(b, i)) + half_value(part(c, i)));
  });
}

inline uint32_t bfloat2_fma(uint32_t a, uint32_t b, uint32_t c) {
  using namespace emulation;
  return each([&](int i) {
    return bfloat_bits(float(double(bfloat_value(part(a, i))) * bfloat_value(part(b, i)) + bfloat_value(part(c, i))));
  });
}

inline uint32_t bfloat2_of(float first, float second) {
  return emulation::bfloat_bits(first) | uint32_t(emulation::bfloat_bits(second)) << 16;
}

inline float as_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float float_of_half(uint16_t bits) { return emulation::half_value(bits); }
inline float float_of_bfloat(uint16_t bits) { return emulation::bfloat_value(bits); }
inline uint16_t half_of_float(float value) { return emulation::half_bits(value); }
inline uint16_t bfloat_of_float(float value) { return emulation::bfloat_bits(value); }

inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma(c, {a0, a1, a2, a3}, {b0, b1}, false);
}
inline void mma_bfloat(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma(c, {a0, a1, a2, a3}, {b0, b1}, true);
}

inline void let_next_grid_start() {}
inline void wait_for_grids_before() { emulation::fibers[emulation::running].waited = true; }

inline float4 load_shared_by_all(const float4* p) {
  emulation::require_wait();
  return *p;
}
inline void store_shared_by_all(float4* p, float4 value) {
  emulation::require_wait();
  *p = value;
}
inline uint64_t evict_first() { return 0; }

inline void copy16(void* shared, const void* global, uint64_t) {
  emulation::begin_copy(emulation::fibers[emulation::running].groups.back(), {shared, global, 16, 0});
}
inline void copy16_or_zeros(void* shared, const void* global, bool copied) {
  const int bytes = copied ? 16 : 0;
  emulation::require_wait();
  emulation::begin_copy(emulation::fibers[emulation::running].groups.back(), {shared, global, bytes, 16 - bytes});
}
inline void copies_commit() { emulation::fibers[emulation::running].groups.emplace_back(); }
template <int PENDING>
void copies_wait() {
  auto& groups = emulation::fibers[emulation::running].groups;
  while (int(groups.size()) - 1 > PENDING) {
    emulation::finish(groups.front());
    groups.erase(groups.begin());
  }
}

inline void barrier_init(uint64_t* barrier) { emulation::barriers[barrier] = {}; }
inline void barriers_visible() {}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  emulation::Bulk& bulk = emulation::barriers.at(barrier);
  bulk.expected += bytes;
  bulk.count++;
}
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, uint64_t) {
  emulation::Bulk& bulk = emulation::barriers.at(barrier);
  emulation::begin_copy(bulk.copies, {shared, global, bytes, 0});
  bulk.count++;
}
inline void barrier_wait(uint64_t* barrier, int phase) {
  emulation::Bulk& bulk = emulation::barriers.at(barrier);
  while (bulk.phase == phase) {
    int queued = 0;
    for (const auto& copy : bulk.copies) queued += copy.bytes;
    if (bulk.expected && queued == bulk.expected) {
      emulation::finish(bulk.copies);
      bulk.expected = 0;
      bulk.phase ^= 1;
    } else {
      emulation::sleep_until_changed(bulk.count, bulk.count);
    }
  }
}

}  // namespace quantspec
