// The choice of instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace mopo {

// Names of the instruction sets that this processor can run, best first. The last is always "portable".
std::vector<std::string> supported_isas();

// The kernels of `isa`, one of supported_isas(); throws std::invalid_argument for any other name.
const Kernels& kernels(const std::string& isa);

}  // namespace mopo
