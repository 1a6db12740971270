// The interface of the SAC kernels: raw pointers and sizes. The caller has checked everything.
#pragma once

#include "common.h"
#include "train.h"

namespace mopo {

// `size` transitions to draw from.
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
  const TrainedLayer* actor;   // [depth], one network: from obs_dim to 2 act_dim
  const TrainedLayer* critic;  // [depth], `critics` networks with targets: from obs_dim + act_dim to 1
  Parameter log_alpha;         // one number

  float actor_learning_rate, critic_learning_rate, alpha_learning_rate;
  float discount, polyak, target_entropy, log_std_min, log_std_max;
  float alpha_max;          // bound of the temperature; infinity for none
  float critic_loss_scale;  // times the mean squared error
  bool simultaneous;        // all gradients are taken before any step; else the critics step before the actor
  Precision precision;      // of the hidden layers' products but the first's; all others are float32

  SacSource real, model;
  int64_t real_rows, model_rows;  // rows of each batch; the real ones come first

  int64_t updates;         // to make in this call
  int64_t updates_before;  // made already: Adam's count
  int64_t first_draw;      // the first update's number for the random counters
  uint64_t seed;
  int threads;
};

// Number of metrics, each summed over the updates, in the order of METRICS in mopo_fast/sac.py.
constexpr int kSacMetrics = 6;

}  // namespace mopo
