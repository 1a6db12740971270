#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "barrier.h"
#include "dispatch.h"
#include "pool.h"
#include "training.h"

namespace mopo {
namespace {

// The memory of a call: parameters in the kernels' layout, and what lies between a batch and their gradients.
class FitState {
 public:
  FitState(const FitArgs& args, const Kernels& kernels, int threads)
      : args_(args), kernels_(kernels), workspaces_(threads + 1), panels_(threads + 1) {
    lay_out();
    arena_.allocate_zeroed();
    lay_out();
    visit([&](const TrainedLayer& layer, int64_t member, const Dense& dense) {
      read_parameters(layer, member, dense, kernels_);
    });
    read_bounds();
  }

  // For a member of one thread alone, or for one of everybody's.
  const FitWorkspace& workspace(const Team& team, int thread) const {
    return workspaces_[team.parts == 1 ? thread : team.parts];
  }

  void write_back() {
    visit([&](const TrainedLayer& layer, int64_t member, const Dense& dense) {
      write_parameters(layer, member, dense, kernels_);
    });
  }

  // The bounds' step, after all members; gives the loss of the whole step.
  double step_bounds(const AdamStep& step) {
    double loss = 0.0;
    for (int64_t member = 0; member < args_.members; ++member) loss += plan.loss[member];
    for (int64_t d = 0; d < args_.dims; ++d) {
      loss += args_.logvar_bound_weight * (args_.max_logvar.value[d] - args_.min_logvar.value[d]);
      double max_grad = args_.logvar_bound_weight, min_grad = -args_.logvar_bound_weight;
      for (int64_t member = 0; member < args_.members; ++member) {
        max_grad += plan.max_grad[member * args_.dims + d];
        min_grad += plan.min_grad[member * args_.dims + d];
      }
      adam(step, args_.max_logvar, d, max_grad);
      adam(step, args_.min_logvar, d, min_grad);
    }
    read_bounds();
    return loss;
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
    layers_.clear();
    for (int64_t member = 0; member < args_.members; ++member)
      for (int64_t l = 0; l < args_.depth; ++l)
        layers_.push_back(take_dense(arena_, args_.layers[l], l > 0, kernels_));
    plan.layers = layers_.data();
    const int64_t dims = round_up(args_.dims, kernels_.panel);
    for (float** each : {&plan.max_logvar, &plan.exp_minus_max, &plan.exp_min}) arena_.take(*each, dims);
    arena_.take(plan.loss, args_.members);
    for (double** each : {&plan.max_grad, &plan.min_grad}) arena_.take(*each, args_.members * args_.dims);
    const int64_t threads = static_cast<int64_t>(workspaces_.size()) - 1;
    const bool own = args_.members >= threads, shared = threads > 1 && args_.members % threads != 0;
    for (int64_t i = 0; i <= threads; ++i)
      if (i < threads ? own : shared) lay_out(workspaces_[i], panels_[i]);
  }

  void lay_out(FitWorkspace& ws, std::array<std::vector<Panels>, 3>& layers) {
    const int64_t rows = round_up(std::min(args_.batch, args_.count), kernels_.block);
    const auto matrix = [&](int64_t width) { return take_panels(arena_, rows, width, kernels_); };
    ws.inputs = matrix(args_.layers[0].in);
    for (std::vector<Panels>& each : layers) {
      each.clear();
      for (int64_t l = 0; l + 1 < args_.depth; ++l) each.push_back(matrix(args_.layers[l].out));
    }
    ws.hidden = layers[0].data();
    ws.slopes = layers[1].data();
    ws.grads = layers[2].data();
    ws.head = take_rows(arena_, rows, 2 * args_.dims);
    ws.head_grad = matrix(2 * args_.dims);
    for (Rows* each : {&ws.targets, &ws.max_grad, &ws.min_grad}) *each = take_rows(arena_, rows, args_.dims);
    arena_.take(ws.loss, rows);
  }

  const FitArgs& args_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Dense> layers_;
  // A workspace for each thread, and one that they share; its matrices.
  std::vector<FitWorkspace> workspaces_;
  std::vector<std::array<std::vector<Panels>, 3>> panels_;
};

}  // namespace

double fit_steps(const FitArgs& args, const Kernels& kernels) {
  const int64_t blocks = (std::min(args.batch, args.count) + kernels.block - 1) / kernels.block;
  const int threads = static_cast<int>(std::min<int64_t>(args.threads, std::max(blocks, args.members)));
  FitState state(args, kernels, threads);
  const int64_t steps = (args.count + args.batch - 1) / args.batch;
  double loss = 0.0;
  Barrier barrier(threads);
  std::vector<std::vector<AdamStep>> adam_steps(threads, std::vector<AdamStep>(args.depth));
  parallel(threads, [&](int thread) {
    const Team all{thread, threads, &barrier};
    std::vector<AdamStep>& layer_steps = adam_steps[thread];
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t begin = step * args.batch, count = std::min(args.batch, args.count - begin);
      const int64_t number = args.steps_before + step + 1;
      for (int64_t l = 0; l < args.depth; ++l)
        layer_steps[l] = adam_step(args.learning_rate, number, args.weight_decay[l], 0.0f);
      for_each_network(args.members, all, [&](int64_t member, const Team& team) {
        kernels.fit_member(args, state.plan, state.workspace(team, thread), member, begin, count,
                           layer_steps.data(), team);
      });
      all.wait();
      if (thread == 0) loss += state.step_bounds(adam_step(args.learning_rate, number, 0.0f, 0.0f));
      all.wait();
    }
  });
  state.write_back();
  return loss;
}

}  // namespace mopo
