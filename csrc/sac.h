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

// The order of the steps of an update, as UPDATE_ORDERS in mopo_fast/config.py.
enum class SacOrder : int {
  kSimultaneous,  // all gradients are taken before any step
  kCriticFirst,   // the critics, then the actor by the new critics
  kActorFirst     // the temperature; the actor, by the old critics; the target, towards the old critics; the
                  // critics, by the new actor and target
};

struct SacArgs {
  int64_t obs_dim, act_dim, critics;
  int64_t target_critics;      // whose least Q is the target's, 1 to `critics`: drawn for each update
  int64_t depth;               // layers of each network, 2 or more; all are ReLU
  const TrainedLayer* actor;   // [depth], one network: from obs_dim to 2 act_dim
  const TrainedLayer* critic;  // [depth], `critics` networks with targets: from obs_dim + act_dim to 1
  Parameter log_alpha;         // one number

  float actor_learning_rate, critic_learning_rate, alpha_learning_rate;
  double adam_epsilon;
  float discount, polyak, target_entropy, log_std_min, log_std_max;
  float log_prob_epsilon;   // see SquashedGaussian::log_prob
  float alpha_max;          // bound of the temperature; infinity for none
  float critic_loss_scale;  // times the mean squared error
  float target_min;         // least target of the critics; -infinity for none
  bool entropy_backup;      // the targets contain the entropy of the next action
  bool mean_actor;          // the actor's Q is the mean of the critics', not the least
  SacOrder order;
  Precision precision;  // of the hidden layers' products but the first's; all others are float32

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
enum SacMetric { kCriticLoss, kActorLoss, kAlphaLoss, kMeanQ, kAlpha, kEntropy, kSacMetrics };
inline int64_t sac_metrics(const SacArgs& args) { return kSacMetrics + args.critics; }

// Adds up an update's metrics of the critics. `sum(j)` is the sum over the batch of critic j's squared
// errors.
template <class Sum>
MOPO_INLINE void add_critic_metrics(const SacArgs& args, double count, double q_sum, Sum sum,
                                    double* metrics) {
  double critic_loss = 0.0;
  for (int64_t j = 0; j < args.critics; ++j) {
    const double loss = args.critic_loss_scale * sum(j) / count;
    metrics[kSacMetrics + j] += loss;
    critic_loss += loss;
  }
  metrics[kCriticLoss] += critic_loss;
  metrics[kMeanQ] += q_sum / (count * static_cast<double>(args.critics));
}

// The steps of the critics, the actor and the temperature in an update of a call. The critics' step moves the
// target towards the critics after it. With kActorFirst that is the move of the update that follows: the
// first one's is made when a call begins, and the last step moves nothing.
struct SacSteps {
  AdamStep critic, actor, alpha;
};
inline SacSteps sac_steps(const SacArgs& args, int64_t update) {
  const int64_t number = args.updates_before + update + 1;
  const bool moves = args.order != SacOrder::kActorFirst || update + 1 < args.updates;
  const auto step = [&](float learning_rate, float polyak) {
    return adam_step(learning_rate, number, 0.0f, polyak, args.adam_epsilon);
  };
  return {step(args.critic_learning_rate, moves ? args.polyak : 0.0f), step(args.actor_learning_rate, 0.0f),
          step(args.alpha_learning_rate, 0.0f)};
}

// The number of the row of its source that a row of a batch takes. `step` is the update's number.
MOPO_INLINE int64_t sac_row(const SacArgs& args, int64_t row, uint32_t step) {
  const bool real = row < args.real_rows;
  if (args.in_order)
    return step * (real ? args.real_rows : args.model_rows) + row - (real ? 0 : args.real_rows);
  const uint32_t word = random_block(static_cast<uint32_t>(row), step, kBatchStream, 0, args.seed).word[0];
  return choose(word, static_cast<uint32_t>((real ? args.real : args.model).size));
}

// Calls visit(place, critic) for the critics of an update's targets, ascending. `step` is the update's
// number. Every subset has the same probability: selection sampling, Knuth, "The Art of Computer
// Programming", volume 2, 3.4.2, algorithm S. random_subset in backends/philox.py is the same.
template <class Visit>
MOPO_INLINE void each_target_critic(const SacArgs& args, uint32_t step, Visit visit) {
  int64_t place = 0;
  for (int64_t critic = 0; place < args.target_critics; ++critic) {
    const int64_t missing = args.target_critics - place, left = args.critics - critic;
    if (missing < left) {
      const uint32_t block = static_cast<uint32_t>(critic / 4);
      const uint32_t word = random_block(0, step, kCriticStream, block, args.seed).word[critic % 4];
      if (choose(word, static_cast<uint32_t>(left)) >= missing) continue;
    }
    visit(place++, critic);
  }
}

// The actor's Q of a row from q(j), that of critic j: the least, or the mean.
template <class Q>
MOPO_INLINE double actor_value(const SacArgs& args, Q q) {
  double least = q(0), sum = least;
  for (int64_t j = 1; j < args.critics; ++j) {
    const double other = q(j);
    if (other < least) least = other;
    sum += other;
  }
  return args.mean_actor ? sum / static_cast<double>(args.critics) : least;
}

// The critics' target of a transition, before SacArgs::target_min. `discount` is 0 after a terminal one,
// whose value then does not count, even if it is not finite. `least` is the least target Q at the next
// observation, of the critics that count.
MOPO_INLINE float td_target(const SacArgs& args, float reward, float discount, float least, float alpha,
                            float log_prob) {
  const float value = least - (args.entropy_backup ? alpha : 0.0f) * log_prob;
  return reward + (discount != 0.0f ? discount * value : 0.0f);
}

}  // namespace mopo
