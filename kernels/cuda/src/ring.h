// A ring of stages in shared memory: tiles of weights and of tokens are on their way while earlier ones are used.
//
// Both kinds have one rhythm: `next` waits for the oldest tile, and once every thread has, has the stage of the tile
// before it filled anew. All threads call it together.
#pragma once

namespace quantspec {

template <class S>
class Ring {
 public:
  __device__ Ring(const Params& p, uint8_t* memory, int first, int end)
      : p_(p), memory_(memory), policy_(evict_first()), fetched_(first), end_(end) {}

 protected:
  __device__ uint8_t* stage(int count) const { return memory_ + count % S::STAGES * S::STAGE_BYTES; }
  __device__ const uint8_t* weights() const { return p_.weights + int64_t(fetched_) * TILE_BYTES; }
  // Rows past n repeat the last one: their columns are never stored.
  __device__ const uint8_t* tokens(int row) const {
    const int64_t values = (row < p_.n ? row : p_.n - 1) * p_.x_stride + fetched_ % p_.k_tiles * S::TILE_K;
    return static_cast<const uint8_t*>(p_.x) + 2 * values;
  }

  const Params& p_;
  uint8_t* memory_;
  uint64_t policy_;
  int fetched_, end_;  // the next tile to be asked for, and the one past the last
  int asked_ = 0, used_ = 0;
};

// From sm_80 on: every thread asks for 16 bytes at a time.
template <class S>
class AsyncRing : Ring<S> {
 public:
  __device__ AsyncRing(const Params& p, uint8_t* memory, int first, int end) : Ring<S>(p, memory, first, end) {
    for (int i = 0; i < S::STAGES - 1; i++) fetch();
  }

  __device__ const uint8_t* next() {
    copies_wait<S::STAGES - 2>();
    __syncthreads();
    fetch();
    return this->stage(this->used_++);
  }

 private:
  __device__ void fetch() {
    uint8_t* stage = this->stage(this->asked_++);
    if (this->fetched_ < this->end_) {
      const uint8_t* weights = this->weights();
      for (int i = threadIdx.x * 16; i < TILE_BYTES; i += THREADS * 16) copy16(stage + i, weights + i, this->policy_);
      constexpr int PIECES = S::TOKEN_BYTES / 16;
      for (int i = threadIdx.x; i < S::TOKENS * PIECES; i += THREADS) {
        const int row = i / PIECES, offset = i % PIECES * 16;
        copy16(stage + TILE_BYTES + row * S::TOKEN_STRIDE + offset, this->tokens(row) + offset);
      }
      this->fetched_++;
    }
    copies_commit();  // also an empty group, so that the count of pending ones means the same to the end
  }
};

// From sm_90 on: one warp asks for whole tiles and rows.
template <class S>
class BulkRing : Ring<S> {
 public:
  __device__ BulkRing(const Params& p, uint8_t* memory, int first, int end) : Ring<S>(p, memory, first, end) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < S::STAGES; i++) barrier_init(barrier(i));
      barriers_visible();
    }
    __syncthreads();
    for (int i = 0; i < S::STAGES - 1; i++) fetch();
  }

  __device__ const uint8_t* next() {
    barrier_wait(barrier(this->used_), this->used_ / S::STAGES & 1);
    __syncthreads();
    fetch();
    return this->stage(this->used_++);
  }

 private:
  __device__ uint64_t* barrier(int count) const {
    return reinterpret_cast<uint64_t*>(this->memory_ + S::STAGES * S::STAGE_BYTES) + count % S::STAGES;
  }

  __device__ void fetch() {
    if (threadIdx.x < 32 && this->fetched_ < this->end_) {
      uint8_t* stage = this->stage(this->asked_);
      uint64_t* arrived = barrier(this->asked_);
      if (threadIdx.x == 0) {
        barrier_expect(arrived, TILE_BYTES + S::TOKENS * S::TOKEN_BYTES);
        copy_bulk(stage, this->weights(), TILE_BYTES, arrived, this->policy_);
      }
      __syncwarp();  // no row may arrive before its bytes are expected
      for (int row = threadIdx.x; row < S::TOKENS; row += 32) {
        copy_bulk(stage + TILE_BYTES + row * S::TOKEN_STRIDE, this->tokens(row), S::TOKEN_BYTES, arrived);
      }
    }
    this->fetched_++;
    this->asked_++;
  }
};

}  // namespace quantspec
