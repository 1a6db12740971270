// The interface of the kernel that evaluates a policy at sampled states: raw pointers and sizes. The caller
// has checked everything.
#pragma once

#include "rollout.h"

namespace mopo {

// States are drawn from Gaussians, `samples` times `members` times `rows` of them. Number r of them in the
// order of `q` has the random counters (r, 0), with the dynamics' stream for the state and the policy's for
// the action.
struct ValuesArgs {
  int64_t obs_dim, act_dim;
  Network policy;   // from obs_dim to 2 act_dim: means and log stds
  Network critics;  // from obs_dim + act_dim to 1
  float log_std_min, log_std_max;
  const float *mean, *std;  // [members][rows][obs_dim]
  int64_t samples, members, rows;
  uint64_t seed;
  Precision precision;
  float* q;  // [samples][members][rows], the least Q over the critics of the policy's action
  int threads;
};

}  // namespace mopo
