// The interface of the SAC kernels: raw pointers and sizes. The caller has checked everything.
#pragma once

#include "common.h"
#include "philox.h"
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
  float log_prob_epsilon;   // see SquashedGaussian::log_prob
  float alpha_max;          // bound of the temperature; infinity for none
  float critic_loss_scale;  // times the mean squared error
  float target_min;         // least target of the critics; -infinity for none
  bool entropy_backup;      // the targets contain the entropy of the next action
  bool simultaneous;        // all gradients are taken before any step; else the critics step before the actor
  Precision precision;      // of the hidden layers' products but the first's; all others are float32

  SacSource real, model;
  int64_t real_rows, model_rows;  // rows of each batch; the real ones come first
  bool in_order;                  // an update takes the next rows of each source; else it draws them

  int64_t updates;         // to make in this call
  int64_t updates_before;  // made already: Adam's count
  int64_t first_draw;      // the first update's number for the random counters
  uint64_t seed;
  int threads;
};

// Metrics, each summed over the updates: those of METRICS in mopo_fast/sac.py in their order, then each
// critic's loss.
constexpr int64_t kSacMetrics = 6;
inline int64_t sac_metrics(const SacArgs& args) { return kSacMetrics + args.critics; }

// The number of the row of its source that a row of a batch takes. `step` is the update's number.
MOPO_INLINE int64_t sac_row(const SacArgs& args, int64_t row, uint32_t step) {
  const bool real = row < args.real_rows;
  if (args.in_order)
    return step * (real ? args.real_rows : args.model_rows) + row - (real ? 0 : args.real_rows);
  const uint32_t word = random_block(static_cast<uint32_t>(row), step, kBatchStream, 0, args.seed).word[0];
  return choose(word, static_cast<uint32_t>((real ? args.real : args.model).size));
}

// The critics' target of a transition, before SacArgs::target_min. `discount` is 0 after a terminal one,
// whose value then does not count, even if it is not finite. `least` is the least target Q at the next
// observation.
MOPO_INLINE float td_target(const SacArgs& args, float reward, float discount, float least, float alpha,
                            float log_prob) {
  const float value = least - (args.entropy_backup ? alpha : 0.0f) * log_prob;
  return reward + (discount != 0.0f ? discount * value : 0.0f);
}

}  // namespace mopo
