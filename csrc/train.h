// Parameters under training and Adam's constants: shared by the interfaces of SAC and the fit.
#pragma once

#include <cmath>
#include <cstdint>

namespace mopo {

// A parameter and Adam's moments, of one shape. `target` is its slow copy, null where there is none.
struct Parameter {
  float *value, *exp_avg, *exp_avg_sq, *target;
};

struct TrainedLayer {
  int64_t in, out;
  Parameter weight;  // [networks][in][out]
  Parameter bias;    // [networks][out]
};

// A layer norm between a hidden layer and its activation.
struct TrainedNorm {
  Parameter scale, shift;  // [networks][out of the layer]
};

// Adam's constants, PyTorch's defaults. Only epsilon may be another.
constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;

// One step of Adam: value -= size * m / (sqrt(v) * root_correction + epsilon), and then
// target += polyak * (value - target).
struct AdamStep {
  float size, root_correction, weight_decay, polyak;
  double epsilon;
};

// Adam's step number `step`, counted from 1.
inline AdamStep adam_step(float learning_rate, int64_t step, float weight_decay, float polyak,
                          double epsilon = kEpsilon) {
  const double correction1 = 1.0 - std::pow(kBeta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(kBeta2, static_cast<double>(step));
  return {static_cast<float>(learning_rate / correction1), static_cast<float>(1.0 / std::sqrt(correction2)),
          weight_decay, polyak, epsilon};
}

}  // namespace mopo
