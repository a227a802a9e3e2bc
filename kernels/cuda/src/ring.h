// A ring of stages in shared memory: tiles of weights and of tokens are on their way while earlier ones are used.
#pragma once

namespace quantspec {

// Weights come 16 bytes a thread at a time, from sm_80 on; or, with BULK, a tile at once, from sm_90 on. Tokens come 16
// bytes at a time either way: their rows are short, and one thread can start but one bulk copy after the other.
template <class S, bool BULK>
class Ring {
 public:
  __device__ Ring(const Params& p, uint8_t* memory, int first, int end)
      : p_(p),
        memory_(memory),
        weights_(p.weights + int64_t(first) * S::TILE_BYTES),
        policy_(evict_first()),
        x_(static_cast<const uint8_t*>(p.x) + 2 * token_ * p.x_stride + offset_),
        k_tile_(first % p.k_tiles),
        left_(end - first) {
    if constexpr (BULK) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) barrier_init(barrier(i));
        barriers_visible();
      }
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < S::STAGES - 1 && i < left_; i++) copy_weights(i, weights_ + i * S::TILE_BYTES);
    }
    // Weights alone are older than the grids before this one. Those may still write x, and read what this one writes.
    // Every thread waits, so that a grid ends after all before it.
    wait_for_grids_before();
#pragma unroll 1
    for (int i = 0; i < S::STAGES - 1; i++) fetch<!BULK>();
  }

  // Waits for the oldest tile, and has the stage of the one before it filled anew, which every thread has left by then.
  // All threads call it together.
  __device__ const uint8_t* next() {
    copies_wait<S::STAGES - 2>();
    if constexpr (BULK) barrier_wait(barrier(using_), phase_);
    __syncthreads();
    fetch<true>();
    const uint8_t* stage = memory_ + using_ * S::STAGE_BYTES;
    using_ = after(using_);
    phase_ ^= using_ == 0;
    return stage;
  }

 private:
  template <bool WEIGHTS>
  __device__ void fetch() {
    if (left_ > 0) {
      if constexpr (WEIGHTS) copy_weights(filling_, weights_);
      copy_tokens(memory_ + filling_ * S::STAGE_BYTES + S::TILE_BYTES);
      weights_ += S::TILE_BYTES;
      k_tile_ = k_tile_ + 1 == p_.k_tiles ? 0 : k_tile_ + 1;
      left_--;
      filling_ = after(filling_);
    }
    copies_commit();  // also an empty group, so that the count of pending ones means the same to the end
  }

  __device__ void copy_weights(int stage, const uint8_t* weights) {
    uint8_t* to = memory_ + stage * S::STAGE_BYTES;
    if constexpr (BULK) {
      if (threadIdx.x == 0) {
        barrier_expect(barrier(stage), S::TILE_BYTES);
        copy_bulk(to, weights, S::TILE_BYTES, barrier(stage), policy_);
      }
    } else {
      each<S::TILE_BYTES / 16>([&](int i) { copy16(to + 16 * i, weights + 16 * i, policy_); });
    }
  }

  __device__ void copy_tokens(uint8_t* to) {
    const int left = 2 * p_.cols - k_tile_ * S::TOKEN_BYTES;
    const uint8_t* x = x_ + int64_t(k_tile_) * S::TOKEN_BYTES;
    const int64_t round_bytes = 2 * ROUND_TOKENS * p_.x_stride;
#pragma unroll
    for (int round = 0; round < (S::TOKENS + ROUND_TOKENS - 1) / ROUND_TOKENS; round++) {
      const int token = round * ROUND_TOKENS + token_;
      if (S::TOKENS % ROUND_TOKENS == 0 || token < S::TOKENS) {
        // Zeros past the last k, where weights are filled up, and past the last token, whose column is never stored.
        copy16_or_zeros(to + token * S::TOKEN_STRIDE + offset_, x + round * round_bytes,
                        token < p_.n && offset_ < left);
      }
    }
  }

  // f(i) for every i < COUNT, shared out over the threads. Unrolled: a loop that began at threadIdx.x was not.
  template <int COUNT, class F>
  __device__ static void each(F f) {
#pragma unroll
    for (int round = 0; round < (COUNT + THREADS - 1) / THREADS; round++) {
      const int i = round * THREADS + threadIdx.x;
      if (COUNT % THREADS == 0 || i < COUNT) f(i);
    }
  }

  __device__ uint64_t* barrier(int stage) const {
    return reinterpret_cast<uint64_t*>(memory_ + S::STAGES * S::STAGE_BYTES) + stage;
  }
  __device__ static int after(int stage) { return stage + 1 == S::STAGES ? 0 : stage + 1; }

  static constexpr int PIECES = S::TOKEN_BYTES / 16, ROUND_TOKENS = THREADS / PIECES;

  const Params& p_;
  uint8_t* memory_;
  const uint8_t* weights_;  // of the next tile to be asked for
  uint64_t policy_;
  // Of the first piece of tokens that this thread copies: its token, its byte, its address in the first tile of k.
  const int token_ = threadIdx.x / PIECES, offset_ = threadIdx.x % PIECES * 16;
  const uint8_t* x_;
  int k_tile_, left_;            // where it is along k; how many are still to be asked for
  int filling_ = 0, using_ = 0;  // stages
  int phase_ = 0;                // of the barriers: how often the ring went round, modulo two
};

}  // namespace quantspec
