// The kernels' calls on the CPU, each with its memory and threads: what the binding calls.
#pragma once

#include <vector>

#include "interrupt.h"
#include "kernels.h"
#include "packed.h"

namespace mopo {

// Makes rollouts; `dynamics` is args.dynamics, packed for these kernels. An interrupt ends the call between
// two steps of a chunk; the output then holds the rows of the first chunks alone.
RolloutCounts rollout(const RolloutArgs& args, const Packed& dynamics, const Kernels& kernels,
                      Interrupt& interrupt);

// Writes args.q. Returns false if it was interrupted; a part of args.q is unset then.
bool least_values(const ValuesArgs& args, const Kernels& kernels, Interrupt& interrupt);

// Updates every parameter of all runs in place, the runs side by side. Returns the sums of each run's
// metrics. An interrupted call leaves every run as it was and returns nothing.
std::vector<std::vector<double>> sac_updates(const std::vector<SacArgs>& runs, const Kernels& kernels,
                                             Interrupt& interrupt);

// Updates every parameter of all runs in place, one run after the other. Returns the sum of each run's
// losses, without weight decay. An interrupt ends it as it ends sac_updates.
std::vector<double> fit_steps(const std::vector<FitArgs>& runs, const Kernels& kernels, Interrupt& interrupt);

}  // namespace mopo
