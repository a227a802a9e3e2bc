// The CUDA kernels: qs_w{4,8}_{half,bfloat}_n{8,16,32,48,64}. Each is started with QS_MEMORY bytes of shared memory.
#include "ptx.h"

#include "matmul.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool QS_BULK = true;
#else
constexpr bool QS_BULK = false;
#endif

extern __shared__ __align__(128) uint8_t qs_memory[];

#define QS_KERNEL(bits, name, type, columns, tokens)                                 \
  extern "C" __global__ void __launch_bounds__(quantspec::THREADS, 1)                \
      qs_w##bits##_##name##_n##tokens(const __grid_constant__ quantspec::Params p) { \
    using namespace quantspec;                                                       \
    matmul<Shape<bits, columns, QS_MEMORY>, type, QS_BULK>(p, qs_memory);            \
  }

#define QS_WIDTHS(bits, name, type)  \
  QS_KERNEL(bits, name, type, 1, 8)  \
  QS_KERNEL(bits, name, type, 2, 16) \
  QS_KERNEL(bits, name, type, 4, 32) \
  QS_KERNEL(bits, name, type, 6, 48) \
  QS_KERNEL(bits, name, type, 8, 64)

QS_WIDTHS(4, half, Half)
QS_WIDTHS(4, bfloat, BFloat)
QS_WIDTHS(8, half, Half)
QS_WIDTHS(8, bfloat, BFloat)
