// The CUDA kernels for weights of one kind: qs_{half,bfloat}_n{8,16,32,48,64}. Each is started with QS_MEMORY bytes of
// shared memory.
#include "ptx.h"

#include "matmul.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool QS_BULK = true;
#else
constexpr bool QS_BULK = false;
#endif

using QsWeights = quantspec::Weights<QS_BITS, QS_GROUP, QS_ZEROS, QS_SCALE_BYTES>;

extern __shared__ __align__(128) uint8_t qs_memory[];

#define QS_KERNEL(name, type, columns, tokens)                                 \
  extern "C" __global__ void __launch_bounds__(quantspec::THREADS, 1)          \
      qs_##name##_n##tokens(const __grid_constant__ quantspec::Params p) {     \
    using namespace quantspec;                                                 \
    matmul<Shape<QsWeights, columns, QS_MEMORY>, type, QS_BULK>(p, qs_memory); \
  }

#define QS_WIDTHS(name, type)  \
  QS_KERNEL(name, type, 1, 8)  \
  QS_KERNEL(name, type, 2, 16) \
  QS_KERNEL(name, type, 4, 32) \
  QS_KERNEL(name, type, 6, 48) \
  QS_KERNEL(name, type, 8, 64)

QS_WIDTHS(half, Half)
QS_WIDTHS(bfloat, BFloat)
