// The SAC kernel's interface: raw pointers and sizes. The caller has checked everything.
#pragma once

#include "common.h"
#include "train.h"

namespace mopo {

// Row-major arrays of `size` transitions to draw from.
struct SacSource {
  Array<const float> observations;  // obs_dim
  Array<const float> actions;       // act_dim
  Array<const float> rewards;
  Array<const float> next_observations;  // obs_dim
  Array<const bool> terminals;
  int64_t size;
};

struct SacArgs {
  int64_t obs_dim, act_dim, critics;
  int64_t depth;               // layers of each network, 2 or more; all are ReLU
  const TrainedLayer* actor;   // [depth], of one network: obs_dim .. 2 act_dim
  const TrainedLayer* critic;  // [depth], of `critics` networks: obs_dim + act_dim .. 1, with targets
  Parameter log_alpha;         // one number

  float actor_learning_rate, critic_learning_rate, alpha_learning_rate;
  float discount, polyak, target_entropy, log_std_min, log_std_max;
  float alpha_max;          // infinity for none
  float critic_loss_scale;  // of the squared error
  bool simultaneous;        // all gradients at the parameters before the update, else the critics step first

  SacSource real, model;
  int64_t real_rows, model_rows;  // of each batch

  int64_t updates, updates_before;  // steps that Adam has made already
  int64_t first_draw;               // the first update's number for the random counters
  uint64_t seed;
  int threads;
};

// Sums over the updates of what METRICS in mopo_fast/sac.py names, in that order.
constexpr int kSacMetrics = 6;

}  // namespace mopo
