// The choice of instruction set, and the kernels' threads.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace mopo {

// What this processor can run, best first; "portable" is always last.
std::vector<std::string> supported_isas();

// Kernels of `isa`, which must be one of supported_isas(); "" takes the best.
const Kernels& kernels(const std::string& isa);

RolloutCounts rollout(const RolloutArgs& args, const Kernels& kernels);

}  // namespace mopo
