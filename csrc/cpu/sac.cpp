// A call of SAC updates: its memory, and the stages of an update on the threads of each run.
#include <algorithm>
#include <cmath>
#include <deque>
#include <exception>
#include <vector>

#include "barrier.h"
#include "calls.h"
#include "denormals.h"
#include "pool.h"
#include "training.h"

namespace mopo {
namespace {

int64_t batch_size(const SacArgs& args) { return args.real_rows + args.model_rows; }

// Rows of every matrix: the batch, rounded up to whole blocks and tiles.
int64_t padded_rows(const SacArgs& args, const Kernels& kernels) {
  return round_up(batch_size(args), granule(args.precision, kernels));
}

// A run's memory: parameters in the kernels' layout, and all matrices between a batch and the gradients.
class SacState {
 public:
  SacState(const SacArgs& args, int64_t slots, const Kernels& kernels)
      : args_(args), kernels_(kernels), slots_(slots), squares_(args.critics) {
    lay_out();
    arena_.allocate_zeroed(layout());
    lay_out();
    copy_temperature(args.log_alpha, log_alpha());
    for (int64_t l = 0; l < args.depth; ++l) {
      read_parameters(args.actor[l], 0, actor_[l], precision(l), kernels);
      for (int64_t j = 0; j < args.critics; ++j) {
        const Dense& critic = critic_[j * args.depth + l];
        read_parameters(args.critic[l], j, critic, precision(l), kernels);
        if (args.order != SacOrder::kActorFirst) continue;
        const FlushDenormals flush;
        kernels.move_target(critic, precision(l), args.polyak);
      }
    }
    // Columns of ones. Those of the hidden layers are set when these are computed.
    const int64_t obs_dim = args.obs_dim, inputs = obs_dim + args.act_dim;
    for (const SacInputs& each : {plan.observations, plan.next_observations}) set_ones(each.numbers, obs_dim);
    for (const SacInputs& each : {plan.inputs, plan.next_inputs, plan.policy_inputs})
      set_ones(each.numbers, inputs);
    const int64_t shares = args.mean_actor ? batch() * args.critics : batch();
    std::fill_n(plan.policy_q_grad, plan.rows, -1.0f / static_cast<float>(shares));
    plan.alpha = temperature();
  }

  int64_t batch() const { return batch_size(args_); }

  // Adds the update's metrics of the policy, and steps the temperature.
  void finish_policy(const AdamStep& step, std::vector<double>& metrics) {
    double log_probs = 0.0, values = 0.0;
    for (int64_t row = 0; row < batch(); ++row) {
      log_probs += plan.log_prob[row];
      values += actor_value(args_, [&](int64_t j) { return plan.policy_q[j * plan.rows + row]; });
    }
    const double count = static_cast<double>(batch()), entropy = -log_probs / count;
    const double gradient = entropy - args_.target_entropy;
    metrics[kAlphaLoss] += log_alpha_[0] * gradient;
    const float before = plan.alpha;
    adam(step, log_alpha(), 0, gradient);
    plan.alpha = temperature();
    const double used = args_.order == SacOrder::kActorFirst ? plan.alpha : before;
    metrics[kActorLoss] += -used * entropy - values / count;
    metrics[kAlpha] += used;
    metrics[kEntropy] += entropy;
  }

  // Adds the update's metrics of the critics, which are of their parameters before it.
  void finish_critics(std::vector<double>& metrics) {
    double q_sum = 0.0;
    std::fill(squares_.begin(), squares_.end(), 0.0);
    for (int64_t row = 0; row < batch(); ++row)
      for (int64_t j = 0; j < args_.critics; ++j) {
        const double q = plan.q[j * plan.rows + row], error = q - plan.targets[row];
        q_sum += q;
        squares_[j] += error * error;
      }
    add_critic_metrics(
        args_, static_cast<double>(batch()), q_sum, [&](int64_t j) { return squares_[j]; }, metrics.data());
  }

  // Copies the parameters to the caller's arrays.
  void write_back() {
    copy_temperature(log_alpha(), args_.log_alpha);
    bool finite = true;
    for (int64_t l = 0; l < args_.depth; ++l) {
      finite &= write_parameters(args_.actor[l], 0, actor_[l], kernels_);
      for (int64_t j = 0; j < args_.critics; ++j)
        finite &= write_parameters(args_.critic[l], j, critic_[j * args_.depth + l], kernels_);
    }
    // Else a product with the padding's zeros may have been NaN, and the padding with it.
    if (finite) arena_.remember(layout());
  }

  SacPlan plan{};

 private:
  static void copy_temperature(const Parameter& from, const Parameter& to) {
    *to.value = *from.value;
    *to.exp_avg = *from.exp_avg;
    *to.exp_avg_sq = *from.exp_avg_sq;
  }

  Parameter log_alpha() { return {&log_alpha_[0], &log_alpha_[1], &log_alpha_[2], nullptr}; }

  float temperature() const { return std::min(std::exp(log_alpha_[0]), args_.alpha_max); }

  void set_ones(const Panels& matrix, int64_t column) {
    const int64_t panel = kernels_.panel;
    float* to = matrix.data + column / panel * matrix.rows * panel + column % panel;
    for (int64_t row = 0; row < matrix.rows; ++row) to[row * panel] = 1.0f;
  }

  // The precision of layer l's products. The last layer is always float32.
  Precision precision(int64_t l) const {
    if (l + 1 == args_.depth) return Precision::kFloat32;
    return l == 0 ? kernels_.first_layer[static_cast<int>(args_.precision)] : args_.precision;
  }

  // Matrices that the gradients of Q by the actions take.
  int64_t action_gradients() const { return args_.mean_actor ? args_.critics : 1; }

  // All that lay_out() depends on.
  std::vector<int64_t> layout() const {
    std::vector<int64_t> result{batch(),
                                args_.critics,
                                args_.target_critics,
                                slots_,
                                action_gradients(),
                                static_cast<int64_t>(args_.precision),
                                static_cast<int64_t>(precision(0)),
                                kernels_.block,
                                kernels_.panel,
                                kernels_.tile};
    for (int64_t l = 0; l < args_.depth; ++l)
      for (const TrainedLayer* layers : {args_.actor, args_.critic})
        result.insert(result.end(), {layers[l].in, layers[l].out});
    return result;
  }

  void lay_out() {
    const int64_t rows = padded_rows(args_, kernels_), hidden = args_.depth - 1;
    const int64_t obs_dim = args_.obs_dim, act_dim = args_.act_dim;
    const auto matrix = [&](int64_t width) { return take_panels(arena_, rows, width, kernels_); };
    // `trained`: a weight's gradient is taken of the factor.
    const auto take = [&](int64_t width, Side side, Precision kind, bool trained) -> Factor {
      if (!trained && in_tiles(kind, kernels_)) return {take_along(arena_, rows, width, kind, kernels_), {}};
      return take_factor(arena_, rows, width, side, kind, kernels_);
    };
    // Outputs of the hidden layers of `networks` networks (kLeft), or gradients before their activations
    // (kGrad). The layer above takes the outputs, the layer itself the gradients. No gradient passes below
    // the first layer, but for the policy's.
    const auto take_layers = [&](std::vector<Factor>& factors, int64_t networks, Side side, bool trained) {
      factors.clear();
      for (int64_t i = 0; i < networks * hidden; ++i) {
        const int64_t l = i % hidden, width = args_.actor[l].out;
        const Precision kind = precision(side == Side::kLeft ? l + 1 : l);
        const bool only_across = side == Side::kGrad && l == 0 && trained && in_tiles(kind, kernels_);
        factors.push_back(only_across ? Factor{{}, take_across(arena_, rows, width, side, kind, kernels_)}
                                      : take(width, side, kind, trained));
      }
      return factors.data();
    };
    const auto take_inputs = [&](int64_t width, bool trained) {
      const Panels numbers = matrix(width);
      const bool packed = in_tiles(precision(0), kernels_);
      return SacInputs{numbers,
                       packed ? take(width, Side::kLeft, precision(0), trained) : Factor{numbers, numbers}};
    };
    plan.rows = rows;
    actor_.clear();
    critic_.clear();
    // Gradients pass through every layer but the actor's first.
    for (int64_t l = 0; l < args_.depth; ++l)
      actor_.push_back(take_dense(arena_, args_.actor[l], l > 0, precision(l), kernels_));
    for (int64_t j = 0; j < args_.critics; ++j) {
      for (int64_t l = 0; l < hidden; ++l)
        critic_.push_back(take_dense(arena_, args_.critic[l], true, precision(l), kernels_));
      critic_.push_back(take_one_row(arena_, args_.critic[hidden], kernels_));
    }
    plan.actor = actor_.data();
    plan.critic = critic_.data();
    plan.actor_hidden = take_layers(actor_hidden_, 1, Side::kLeft, true);
    plan.actor_grad = take_layers(actor_grad_, 1, Side::kGrad, true);
    plan.critic_hidden = take_layers(critic_hidden_, slots_, Side::kLeft, true);
    plan.critic_grad = take_layers(critic_grad_, slots_, Side::kGrad, true);
    plan.policy_hidden = take_layers(policy_hidden_, args_.critics, Side::kLeft, false);
    plan.policy_grad = take_layers(policy_grad_, slots_, Side::kGrad, false);
    // The actor's outputs take the place of those at the next observations, and the critics' that of the
    // targets'.
    plan.next_hidden = share(next_hidden_, actor_hidden_);
    plan.target_hidden = share(target_hidden_, critic_hidden_);
    for (SacInputs* each : {&plan.observations, &plan.next_observations})
      *each = take_inputs(obs_dim, each == &plan.observations);
    for (SacInputs* each : {&plan.inputs, &plan.next_inputs, &plan.policy_inputs})
      *each = take_inputs(obs_dim + act_dim, each == &plan.inputs);
    plan.actor_head = take_rows(arena_, rows, 2 * act_dim);
    plan.actor_head_grad = matrix(2 * act_dim);
    for (Rows* each : {&plan.noise, &plan.spread, &plan.slopes, &plan.actions})
      *each = take_rows(arena_, rows, act_dim);
    plan.action_grad = take_rows(arena_, action_gradients() * rows, obs_dim + act_dim);
    for (float** each :
         {&plan.rewards, &plan.discounts, &plan.log_prob, &plan.next_log_prob, &plan.policy_q_grad})
      arena_.take(*each, rows);
    for (float** each : {&plan.q, &plan.q_grad, &plan.policy_q, &plan.targets})
      arena_.take(*each, args_.critics * rows);
    arena_.take(plan.target_q, args_.target_critics * rows);
    arena_.take(plan.drawn, rows);
    arena_.take(plan.picked, args_.critics * rows);
  }

  // Makes `factors` share the memory of `others`, of which no weight's gradient is taken then.
  static const Factor* share(std::vector<Factor>& factors, const std::vector<Factor>& others) {
    factors = others;
    for (Factor& factor : factors) factor.across = {};
    return factors.data();
  }

  const SacArgs& args_;
  const Kernels& kernels_;
  const int64_t slots_;
  Arena arena_;
  float log_alpha_[3];           // value and moments
  std::vector<double> squares_;  // [critics], sums of an update's squared errors
  std::vector<Dense> actor_, critic_;
  std::vector<Factor> actor_hidden_, next_hidden_, actor_grad_, critic_hidden_, critic_grad_, target_hidden_,
      policy_hidden_, policy_grad_;
};

// The critics that a thread works on, in its order. With c critics and t threads, every thread has
// floor(c / t) critics to itself, for which it waits for nobody, and a slot for them. All threads share the
// rest, which come first, and their slot, the last one.
std::vector<CriticTurn> turns(int64_t critics, const Team& all) {
  std::vector<CriticTurn> result;
  const int64_t own = critics / all.parts, first_shared = own * all.parts;
  for (int64_t critic = first_shared; critic < critics; ++critic)
    result.push_back({critic, own > 0 ? all.parts : 0, all});
  for (int64_t i = 0; i < own; ++i) result.push_back({own * all.part + i, all.part, Team{0, 1, nullptr}});
  return result;
}
int64_t count_slots(int64_t critics, int64_t threads) {
  return (critics >= threads ? threads : 0) + (critics % threads != 0 ? 1 : 0);
}

// One run of a call: its memory, its threads and the sums of its metrics.
struct SacWork {
  SacWork(const SacArgs& args, const Kernels& kernels)
      : args(args),
        threads(static_cast<int>(
            std::min(int64_t{args.threads}, padded_rows(args, kernels) / granule(args.precision, kernels)))),
        state(args, std::max(count_slots(args.critics, threads), count_slots(args.target_critics, threads)),
              kernels),
        barrier(threads),
        metrics(sac_metrics(args)),
        drawn(args.target_critics) {
    for (int thread = 0; thread < threads; ++thread) {
      const Team all{thread, threads, &barrier};
      turns_of.push_back(turns(args.critics, all));
      target_turns_of.push_back(turns(args.target_critics, all));
    }
  }

  void run(const Kernels& kernels, Interrupt& interrupt) {
    parallel(threads, [&](int thread) { work(kernels, interrupt, thread); }, interrupt);
  }

  const SacArgs& args;
  const int threads;
  SacState state;
  Barrier barrier;
  // A thread's each. In the second one a critic is its place among those of the targets.
  std::vector<std::vector<CriticTurn>> turns_of, target_turns_of;
  std::vector<double> metrics;
  std::vector<int64_t> drawn;  // [target_critics], the critics of the current update's targets

 private:
  void work(const Kernels& kernels, Interrupt& interrupt, int thread) {
    const FlushDenormals flush;
    const SacPlan& plan = state.plan;
    const Team all{thread, threads, &barrier};
    const std::vector<CriticTurn>& critics = turns_of[thread];
    // Ends a stage: waits for all threads. True if the call is to end, the same for all. Two flags in turn,
    // because a slow thread may still read one when the next stage's is written; it has read it before the
    // one after that.
    int64_t passes = 0;
    const auto ended = [&] {
      bool& stop = stop_[passes++ % 2];
      if (thread == 0) stop = interrupt.requested();
      all.wait();
      return stop;
    };
    const auto sample = [&](int64_t update) {
      if (thread == 0)
        each_target_critic(args, static_cast<uint32_t>(args.first_draw + update),
                           [&](int64_t place, int64_t critic) { drawn[place] = critic; });
      kernels.sac_sample(args, plan, all, update);
    };
    const auto target = [&] {
      for (const auto& [place, slot, team] : target_turns_of[thread])
        kernels.sac_target(args, plan, {drawn[place], slot, team}, place);
    };
    const auto evaluate = [&] {
      for (const CriticTurn& turn : critics) kernels.sac_evaluate(args, plan, turn);
    };
    const auto critic = [&](const AdamStep& step) {
      for (const CriticTurn& turn : critics) kernels.sac_critic(args, plan, turn, step);
    };
    const auto action_gradient = [&](const AdamStep& step) {
      for (const CriticTurn& turn : critics) kernels.sac_action_gradient(args, plan, turn, step);
    };
    for (int64_t update = 0; update < args.updates; ++update) {
      const SacSteps steps = sac_steps(args, update);
      sample(update);
      if (ended()) return;
      if (args.order == SacOrder::kActorFirst) {
        evaluate();
        if (ended()) return;
        if (thread == 0) state.finish_policy(steps.alpha, metrics);
        action_gradient(steps.critic);
        if (ended()) return;
        kernels.sac_actor(args, plan, all, steps.actor);
        if (ended()) return;
        kernels.sac_next(args, plan, all, update);
        if (ended()) return;
        target();
        if (ended()) return;
        critic(steps.critic);
        if (ended()) return;
        // The next stage changes none of the numbers that this reads.
        if (thread == 0) state.finish_critics(metrics);
        continue;
      }
      target();
      if (args.order == SacOrder::kSimultaneous) {
        evaluate();
        if (ended()) return;
        for (const CriticTurn& turn : critics) {
          kernels.sac_critic(args, plan, turn, steps.critic);
          kernels.sac_action_gradient(args, plan, turn, steps.critic);
        }
      } else {
        if (ended()) return;
        critic(steps.critic);
        evaluate();
        if (ended()) return;
        action_gradient(steps.critic);
      }
      if (ended()) return;
      kernels.sac_actor(args, plan, all, steps.actor);
      if (thread == 0) {
        state.finish_policy(steps.alpha, metrics);
        state.finish_critics(metrics);
      }
      if (ended()) return;
    }
  }

  bool stop_[2] = {false, false};
};

}  // namespace

std::vector<std::vector<double>> sac_updates(const std::vector<SacArgs>& runs, const Kernels& kernels,
                                             Interrupt& interrupt) {
  // All memory is taken before the threads start, so that nothing can fail in them.
  std::deque<SacWork> works;
  for (const SacArgs& args : runs) works.emplace_back(args, kernels);
  // A run's threads may be too many for the system, but nothing may be thrown on a thread of the pool.
  std::vector<std::exception_ptr> errors(works.size());
  const auto work = [&](int run) {
    try {
      works[run].run(kernels, interrupt);
    } catch (...) {
      errors[run] = std::current_exception();
    }
  };
  parallel(static_cast<int>(works.size()), work, interrupt);
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
  std::vector<std::vector<double>> metrics;
  if (interrupt.requested()) return metrics;
  for (SacWork& done : works) {
    done.state.write_back();
    metrics.push_back(done.metrics);
  }
  return metrics;
}

}  // namespace mopo
