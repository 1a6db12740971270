#include <algorithm>
#include <barrier>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "pool.h"
#include "training.h"

namespace mopo {
namespace {

// The memory of a call: parameters in the kernels' layout, and what lies between a batch and their gradients.
class FitState {
 public:
  FitState(const FitArgs& args, const Kernels& kernels)
      : args_(args), kernels_(kernels), max_grad_(args.dims), min_grad_(args.dims) {
    lay_out();
    arena_.allocate_zeroed();
    lay_out();
    visit([](const TrainedLayer& layer, int64_t member, Dense& dense) {
      read_parameters(layer, member, dense);
    });
    for (int64_t row = 0; row < plan.rows; ++row) plan.inputs.at(row)[args.layers[0].in] = 1.0f;
    read_bounds();
  }

  void write_back() {
    visit([](const TrainedLayer& layer, int64_t member, Dense& dense) {
      write_parameters(layer, member, dense);
    });
  }

  // Adds a member's loss, and its gradient by the bounds, over `count` rows in their order.
  void add_member(int64_t count, double& loss) {
    for (int64_t row = 0; row < count; ++row) {
      loss += plan.loss[row];
      for (int64_t d = 0; d < args_.dims; ++d) {
        max_grad_[d] += plan.max_grad.at(row)[d];
        min_grad_[d] += plan.min_grad.at(row)[d];
      }
    }
  }

  // The bounds' step, after all members; their own part of the loss is added.
  void step_bounds(const AdamStep& step, double& loss) {
    for (int64_t d = 0; d < args_.dims; ++d) {
      loss += args_.logvar_bound_weight * (args_.max_logvar.value[d] - args_.min_logvar.value[d]);
      adam(step, args_.max_logvar, d, max_grad_[d] + args_.logvar_bound_weight);
      adam(step, args_.min_logvar, d, min_grad_[d] - args_.logvar_bound_weight);
      max_grad_[d] = min_grad_[d] = 0.0;
    }
    read_bounds();
  }

  FitPlan plan{};

 private:
  template <class Visit>
  void visit(Visit function) {
    for (int64_t member = 0; member < args_.members; ++member)
      for (int64_t l = 0; l < args_.depth; ++l)
        function(args_.layers[l], member, layers_[member * args_.depth + l]);
  }

  void read_bounds() {
    for (int64_t d = 0; d < args_.dims; ++d) {
      plan.max_logvar[d] = args_.max_logvar.value[d];
      plan.exp_minus_max[d] = std::exp(-args_.max_logvar.value[d]);
      plan.exp_min[d] = std::exp(args_.min_logvar.value[d]);
    }
  }

  void lay_out() {
    const int64_t rows = round_up(std::min(args_.batch, args_.count), kernels_.rows);
    const auto matrix = [&](int64_t width) { return take_rows(arena_, rows, width, kernels_); };
    const auto hidden_layers = [&](std::vector<Rows>& layers) {
      layers.clear();
      for (int64_t l = 0; l + 1 < args_.depth; ++l) layers.push_back(matrix(args_.layers[l].out));
      return layers.data();
    };
    layers_.clear();
    for (int64_t member = 0; member < args_.members; ++member)
      for (int64_t l = 0; l < args_.depth; ++l)
        layers_.push_back(take_dense(arena_, args_.layers[l], l == 0 ? args_.layers[l].in : 0, kernels_));
    plan.rows = rows;
    plan.layers = layers_.data();
    plan.inputs = matrix(args_.layers[0].in);
    for (Rows* each : {&plan.head, &plan.head_grad}) *each = matrix(2 * args_.dims);
    for (Rows* each : {&plan.targets, &plan.max_grad, &plan.min_grad}) *each = matrix(args_.dims);
    plan.hidden = hidden_layers(hidden_);
    plan.slopes = hidden_layers(slopes_);
    plan.grads = hidden_layers(grads_);
    arena_.take(plan.loss, rows);
    for (float** each : {&plan.max_logvar, &plan.exp_minus_max, &plan.exp_min})
      arena_.take(*each, matrix_stride(args_.dims, kernels_));
  }

  const FitArgs& args_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Dense> layers_;
  std::vector<Rows> hidden_, slopes_, grads_;
  std::vector<double> max_grad_, min_grad_;
};

}  // namespace

double fit_steps(const FitArgs& args, const Kernels& kernels) {
  FitState state(args, kernels);
  const int64_t blocks = state.plan.rows / kernels.rows;
  const int threads = static_cast<int>(std::min<int64_t>(args.threads, blocks));
  const int64_t steps = (args.count + args.batch - 1) / args.batch;
  double loss = 0.0;
  std::barrier<> barrier(threads);
  std::vector<std::vector<AdamStep>> adam_steps(threads, std::vector<AdamStep>(args.depth));
  parallel(threads, [&](int thread) {
    std::vector<AdamStep>& layer_steps = adam_steps[thread];
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t begin = step * args.batch, count = std::min(args.batch, args.count - begin);
      const int64_t used = (count + kernels.rows - 1) / kernels.rows;
      const int64_t first = used * thread / threads, last = used * (thread + 1) / threads;
      const int64_t number = args.steps_before + step + 1;
      for (int64_t l = 0; l < args.depth; ++l)
        layer_steps[l] = adam_step(args.learning_rate, number, args.weight_decay[l], 0.0f);
      for (int64_t member = 0; member < args.members; ++member) {
        kernels.fit_rows(args, state.plan, member, begin, count, first * kernels.rows, last * kernels.rows);
        barrier.arrive_and_wait();
        kernels.fit_train(args, state.plan, member, count, layer_steps.data(), thread, threads);
        if (thread == 0) {
          state.add_member(count, loss);
          if (member + 1 == args.members)
            state.step_bounds(adam_step(args.learning_rate, number, 0.0f, 0.0f), loss);
        }
        barrier.arrive_and_wait();
      }
    }
  });
  state.write_back();
  return loss;
}

}  // namespace mopo
