// The whole native CPU library is this one translation unit: nothing to link, and everything can be inlined.
#include "bandwidth.h"
#include "eagle.h"
#include "forward.h"
#include "packing.h"
#include "pool.h"
#include "sampling.h"

// Sizes of the structs that Python mirrors, for a test.
QS_EXPORT void qs_struct_sizes(int64_t* sizes) {
  using namespace quantspec;
  const size_t all[] = {sizeof(Linear), sizeof(Layer),     sizeof(Model),     sizeof(Rows),
                        sizeof(Cache),  sizeof(TapTarget), sizeof(EagleLayer)};
  for (const size_t size : all) *sizes++ = int64_t(size);
}
