// The whole native CPU library is this one translation unit: nothing to link, and everything can be inlined.
#include "bandwidth.h"
#include "eagle.h"
#include "forward.h"
#include "packing.h"
#include "pool.h"
#include "sampling.h"
