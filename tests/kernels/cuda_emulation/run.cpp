// The kernels' own code on the emulated device, and their index functions, for Python.
#include "device.h"

#include "../../../kernels/cuda/src/matmul.h"

namespace quantspec {

template <class S, class T, bool BULK>
int launch(const Params& p, int blocks, const int32_t* order, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint64_t> memory((S::STAGES * S::STAGE_BYTES + RESERVED) / 8 + 2);
  uint8_t* aligned = reinterpret_cast<uint8_t*>((uintptr_t(memory.data()) + 15) / 16 * 16);
  gridDim.x = blocks;
  for (int i = 0; i < blocks; i++) {
    blockIdx.x = order[i];
    std::fill(memory.begin(), memory.end(), ~uint64_t(0));
    auto body = [&] { matmul<S, T, BULK>(p, aligned); };
    if (!emulation::run_block(THREADS, random, body)) return 1;
  }
  return 0;
}

using Stored = Weights<QS_BITS, QS_GROUP, QS_ZEROS, QS_SCALE_BYTES>;

template <class T, int COLUMNS>
int with_ring(bool bulk, const Params& p, int blocks, const int32_t* order, uint32_t seed) {
  // Few stages, so that short sums go round the ring: two is the least that works.
  constexpr int STAGE = Shape<Stored, COLUMNS, 1 << 20>::STAGE_BYTES;
  if (bulk) return launch<Shape<Stored, COLUMNS, RESERVED + 3 * STAGE>, T, true>(p, blocks, order, seed);
  constexpr int STAGES = COLUMNS == 8 ? 2 : 4;
  return launch<Shape<Stored, COLUMNS, RESERVED + STAGES * STAGE>, T, false>(p, blocks, order, seed);
}

template <class T>
int with_columns(int columns, bool bulk, const Params& p, int blocks, const int32_t* order, uint32_t seed) {
  if (columns == 1) return with_ring<T, 1>(bulk, p, blocks, order, seed);
  if (columns == 2) return with_ring<T, 2>(bulk, p, blocks, order, seed);
  if (columns == 4) return with_ring<T, 4>(bulk, p, blocks, order, seed);
  if (columns == 6) return with_ring<T, 6>(bulk, p, blocks, order, seed);
  return with_ring<T, 8>(bulk, p, blocks, order, seed);
}

}  // namespace quantspec

// 0, or 1 where threads wait for each other forever. `order` is the order in which blocks run.
extern "C" int emulate(int bfloat, int columns, int bulk, const quantspec::Params* p, int blocks, const int32_t* order,
                       uint32_t seed) {
  using namespace quantspec;
  return bfloat ? with_columns<BFloat>(columns, bulk, *p, blocks, order, seed)
                : with_columns<Half>(columns, bulk, *p, blocks, order, seed);
}

extern "C" int params_size() { return sizeof(quantspec::Params); }
extern "C" int split_first(int tiles, int blocks, int block) { return quantspec::Split{tiles, blocks}.first(block); }
extern "C" int split_block_of(int tiles, int blocks, int tile) {
  return quantspec::Split{tiles, blocks}.block_of(tile);
}
extern "C" int slot(int tiles, int blocks, int k_tiles, int block, int row_block) {
  return quantspec::workspace_slot({tiles, blocks}, k_tiles, block, row_block);
}

// All pairs of codes that a word expands to, less a zero point, as their bits.
template <class T>
void expand_word(uint32_t low, uint32_t high, uint32_t zero, uint32_t (&pairs)[4]) {
  if (QS_BITS == 4) {
    T::expand4(low, T::zero(zero), pairs);
  } else {
    T::expand8(low, high, T::zero(zero), pairs);
  }
}

extern "C" void expand(int bfloat, uint32_t low, uint32_t high, uint32_t zero, uint32_t* out) {
  using namespace quantspec;
  uint32_t pairs[4];
  bfloat ? expand_word<BFloat>(low, high, zero, pairs) : expand_word<Half>(low, high, zero, pairs);
  std::copy(pairs, pairs + 4, out);
}
