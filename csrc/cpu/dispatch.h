// The choice of instruction set, and the kernels with their memory and threads.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernels.h"

namespace mopo {

// What this processor can run, best first; "portable" is always last.
std::vector<std::string> supported_isas();

// Kernels of `isa`, which must be one of supported_isas(); "" takes the best.
const Kernels& kernels(const std::string& isa);

RolloutCounts rollout(const RolloutArgs& args, const Kernels& kernels);

// Updates every parameter in place; sums of the metrics.
std::array<double, kSacMetrics> sac_updates(const SacArgs& args, const Kernels& kernels);

// Updates every parameter in place; the sum of the steps' losses, weight decay left out.
double fit_steps(const FitArgs& args, const Kernels& kernels);

}  // namespace mopo
