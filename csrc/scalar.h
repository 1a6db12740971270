// spec.h over one float, on host and device, and the functions that it needs. Vectors have theirs in cpu/.
#pragma once

#include <cmath>

#include "common.h"
#include "train.h"

namespace mopo {

MOPO_INLINE float select(bool mask, float yes, float no) { return mask ? yes : no; }
MOPO_INLINE float sqrt(float x) { return sqrtf(x); }
MOPO_INLINE float exp(float x) { return expf(x); }
MOPO_INLINE float log(float x) { return logf(x); }
MOPO_INLINE float log1p(float x) { return log1pf(x); }
MOPO_INLINE float tanh(float x) { return tanhf(x); }
MOPO_INLINE float fast_sqrt(float x) { return sqrtf(x); }
MOPO_INLINE auto fast_quotient(float x, auto y) { return x / y; }

#include "spec.h"

}  // namespace mopo
