// The choice of instruction set, and the kernels with their memory and threads.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "interrupt.h"
#include "kernels.h"

namespace mopo {

// What this processor can run, best first; "portable" is always last.
std::vector<std::string> supported_isas();

// Kernels of `isa`, which must be one of supported_isas(); "" takes the best.
const Kernels& kernels(const std::string& isa);

// Rollouts, which an interrupt ends between two steps: the output then holds rows of the first ones only.
RolloutCounts rollout(const RolloutArgs& args, const Kernels& kernels, Interrupt& interrupt);

// Updates every parameter of all runs in place, side by side; sums of each run's metrics. Interrupted, it
// leaves every run as it was, and gives nothing.
std::vector<std::array<double, kSacMetrics>> sac_updates(const std::vector<SacArgs>& runs,
                                                         const Kernels& kernels, Interrupt& interrupt);

// Updates every parameter of all runs in place, one run after the other; the sum of each one's losses, weight
// decay left out. Interrupted likewise.
std::vector<double> fit_steps(const std::vector<FitArgs>& runs, const Kernels& kernels, Interrupt& interrupt);

// The machine's peak, to be timed: so many rounds of multiply-adds on registers on each thread; gives their
// FLOP.
double multiply_adds(const Kernels& kernels, bool bfloat16, int64_t rounds, int threads,
                     Interrupt& interrupt);

}  // namespace mopo
