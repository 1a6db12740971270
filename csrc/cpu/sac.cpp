#include <algorithm>
#include <barrier>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "pool.h"
#include "training.h"

namespace mopo {
namespace {

// The memory of a call: parameters in the kernels' layout, and everything between a batch and their
// gradients.
class SacState {
 public:
  SacState(const SacArgs& args, const Kernels& kernels) : args_(args), kernels_(kernels) {
    lay_out();
    arena_.allocate_zeroed();
    lay_out();
    for (int64_t l = 0; l < args.depth; ++l) {
      read_parameters(args.actor[l], 0, actor_[l]);
      for (int64_t j = 0; j < args.critics; ++j)
        read_parameters(args.critic[l], j, critic_[j * args.depth + l]);
    }
    // Columns of ones; the hidden layers' are set as they are computed.
    for (int64_t row = 0; row < plan.rows; ++row) {
      for (const Rows& rows : {plan.observations, plan.next_observations}) rows.at(row)[args.obs_dim] = 1.0f;
      for (const Rows& rows : {plan.inputs, plan.next_inputs, plan.policy_inputs})
        rows.at(row)[args.obs_dim + args.act_dim] = 1.0f;
      plan.minus_share[row] = -1.0f / static_cast<float>(batch());
    }
    plan.alpha = temperature();
  }

  int64_t batch() const { return args_.real_rows + args_.model_rows; }

  // The temperature's step; adds the update's metrics, which are of the state before it.
  void finish_update(const AdamStep& step, std::array<double, kSacMetrics>& metrics) {
    double squares = 0.0, q_sum = 0.0, log_probs = 0.0, least_q = 0.0;
    for (int64_t row = 0; row < batch(); ++row) {
      for (int64_t j = 0; j < args_.critics; ++j) {
        const double q = plan.q[j * plan.rows + row], error = q - plan.targets[row];
        q_sum += q;
        squares += error * error;
      }
      log_probs += plan.log_prob[row];
      least_q += plan.policy_q[plan.least[row] * plan.rows + row];
    }
    const double count = static_cast<double>(batch()), entropy = -log_probs / count;
    const double gradient = entropy - args_.target_entropy;
    const double values[kSacMetrics] = {args_.critic_loss_scale * squares / count,
                                        -plan.alpha * entropy - least_q / count,
                                        *args_.log_alpha.value * gradient,
                                        q_sum / (count * static_cast<double>(args_.critics)),
                                        plan.alpha,
                                        entropy};
    for (int i = 0; i < kSacMetrics; ++i) metrics[i] += values[i];
    adam(step, args_.log_alpha, 0, gradient);
    plan.alpha = temperature();
  }

  void write_back() const {
    for (int64_t l = 0; l < args_.depth; ++l) {
      write_parameters(args_.actor[l], 0, actor_[l]);
      for (int64_t j = 0; j < args_.critics; ++j)
        write_parameters(args_.critic[l], j, critic_[j * args_.depth + l]);
    }
  }

  SacPlan plan{};

 private:
  float temperature() const { return std::min(std::exp(*args_.log_alpha.value), args_.alpha_max); }

  void lay_out() {
    const int64_t rows = round_up(batch(), kernels_.rows), hidden = args_.depth - 1;
    const int64_t obs_dim = args_.obs_dim, act_dim = args_.act_dim;
    const auto matrix = [&](int64_t width) { return take_rows(arena_, rows, width, kernels_); };
    const auto hidden_layers = [&](std::vector<Rows>& layers, int64_t networks) {
      layers.clear();
      for (int64_t j = 0; j < networks; ++j)
        for (int64_t l = 0; l < hidden; ++l) layers.push_back(matrix(args_.actor[l].out));
      return layers.data();
    };
    actor_.clear();
    critic_.clear();
    // The gradient goes back through every layer but the actor's first; of the critics' first, to the
    // actions.
    for (int64_t l = 0; l < args_.depth; ++l)
      actor_.push_back(take_dense(arena_, args_.actor[l], l == 0 ? args_.actor[l].in : 0, kernels_));
    for (int64_t j = 0; j < args_.critics; ++j)
      for (int64_t l = 0; l < args_.depth; ++l)
        critic_.push_back(l == hidden ? take_one_row(arena_, args_.critic[l], kernels_)
                                      : take_dense(arena_, args_.critic[l], l == 0 ? obs_dim : 0, kernels_));
    plan.rows = rows;
    plan.actor = actor_.data();
    plan.critic = critic_.data();
    for (Rows* each : {&plan.observations, &plan.next_observations}) *each = matrix(obs_dim);
    for (Rows* each : {&plan.inputs, &plan.next_inputs, &plan.policy_inputs})
      *each = matrix(obs_dim + act_dim);
    for (Rows* each : {&plan.actor_head, &plan.actor_head_grad}) *each = matrix(2 * act_dim);
    for (Rows* each : {&plan.noise, &plan.spread, &plan.actions, &plan.action_grad}) *each = matrix(act_dim);
    plan.actor_hidden = hidden_layers(actor_hidden_, 1);
    plan.actor_grad = hidden_layers(actor_grad_, 1);
    plan.critic_hidden = hidden_layers(critic_hidden_, args_.critics);
    plan.critic_grad = hidden_layers(critic_grad_, args_.critics);
    plan.scratch_hidden = hidden_layers(scratch_hidden_, args_.critics);
    int64_t widest = 0;
    for (int64_t l = 0; l < hidden; ++l) widest = std::max(widest, args_.actor[l].out);
    for (Rows& each : plan.scratch_grad) each = matrix(widest);
    for (float** each : {&plan.rewards, &plan.continues, &plan.log_prob, &plan.targets, &plan.minus_share})
      arena_.take(*each, rows);
    for (float** each : {&plan.q, &plan.q_grad, &plan.policy_q}) arena_.take(*each, args_.critics * rows);
    for (int64_t** each : {&plan.least, &plan.picked}) arena_.take(*each, rows);
  }

  const SacArgs& args_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Dense> actor_, critic_;
  std::vector<Rows> actor_hidden_, actor_grad_, critic_hidden_, critic_grad_, scratch_hidden_;
};

}  // namespace

std::array<double, kSacMetrics> sac_updates(const SacArgs& args, const Kernels& kernels) {
  SacState state(args, kernels);
  const int64_t blocks = state.plan.rows / kernels.rows;
  const int threads = static_cast<int>(std::min<int64_t>(args.threads, blocks));
  std::array<double, kSacMetrics> metrics{};
  std::barrier<> barrier(threads);
  parallel(threads, [&](int thread) {
    const int64_t first = blocks * thread / threads * kernels.rows;
    const int64_t last = blocks * (thread + 1) / threads * kernels.rows;
    for (int64_t update = 0; update < args.updates; ++update) {
      const int64_t number = args.updates_before + update + 1;
      const auto train_critics = [&] {
        const AdamStep step = adam_step(args.critic_learning_rate, number, 0.0f, args.polyak);
        kernels.sac_train_critics(args, state.plan, step, thread, threads);
      };
      kernels.sac_critic_rows(args, state.plan, update, first, last);
      if (!args.simultaneous) {
        barrier.arrive_and_wait();
        train_critics();
        barrier.arrive_and_wait();
      }
      kernels.sac_actor_rows(args, state.plan, update, first, last);
      barrier.arrive_and_wait();
      if (args.simultaneous) train_critics();
      kernels.sac_train_actor(args, state.plan, adam_step(args.actor_learning_rate, number, 0.0f, 0.0f),
                              thread, threads);
      if (thread == 0) state.finish_update(adam_step(args.alpha_learning_rate, number, 0.0f, 0.0f), metrics);
      barrier.arrive_and_wait();
    }
  });
  state.write_back();
  return metrics;
}

}  // namespace mopo
