// Networks under training: what the SAC and the fit kernels' interfaces share.
#pragma once

#include <cstdint>

namespace mopo {

// A parameter and Adam's moments, shaped alike; `target` follows it slowly, null where there is none.
struct Parameter {
  float *value, *exp_avg, *exp_avg_sq, *target;
};

struct TrainedLayer {
  int64_t in, out;
  Parameter weight;  // [networks][in][out]
  Parameter bias;    // [networks][out]
};

// Adam's constants, PyTorch's defaults.
constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;

}  // namespace mopo
