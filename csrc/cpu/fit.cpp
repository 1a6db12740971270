#include <algorithm>
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
      : args_(args), kernels_(kernels), workspaces_(threads + 1), matrices_(threads + 1) {
    lay_out();
    arena_.allocate_zeroed();
    lay_out();
    visit([&](const TrainedLayer& layer, int64_t member, const Dense& dense) {
      read_parameters(layer, member, dense, args_.bfloat16, kernels_);
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
  struct Matrices {
    std::vector<Factor> hidden, grads;
    std::vector<Panels> slopes;
  };

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
        layers_.push_back(take_dense(arena_, args_.layers[l], l > 0, args_.bfloat16, kernels_));
    plan.layers = layers_.data();
    const int64_t dims = round_up(args_.dims, kernels_.panel);
    for (float** each : {&plan.max_logvar, &plan.exp_minus_max, &plan.exp_min}) arena_.take(*each, dims);
    arena_.take(plan.loss, args_.members);
    for (double** each : {&plan.max_grad, &plan.min_grad}) arena_.take(*each, args_.members * args_.dims);
    const int64_t threads = static_cast<int64_t>(workspaces_.size()) - 1;
    const bool own = args_.members >= threads, shared = threads > 1 && args_.members % threads != 0;
    for (int64_t i = 0; i <= threads; ++i)
      if (i < threads ? own : shared) lay_out(workspaces_[i], matrices_[i]);
  }

  void lay_out(FitWorkspace& ws, Matrices& matrices) {
    const int64_t rows =
        round_up(std::min(args_.batch, args_.count), std::max(kernels_.block, kernels_.tile));
    const auto panels = [&](int64_t width) { return take_panels(arena_, rows, width, kernels_); };
    const auto factor = [&](int64_t width, Side side) {
      return take_factor(arena_, rows, width, side, args_.bfloat16, kernels_);
    };
    matrices = {};
    for (int64_t l = 0; l + 1 < args_.depth; ++l) {
      const int64_t width = args_.layers[l].out;
      matrices.hidden.push_back(factor(width, Side::kLeft));
      matrices.grads.push_back(factor(width, Side::kGrad));
      matrices.slopes.push_back(panels(width));
    }
    ws.hidden = matrices.hidden.data();
    ws.grads = matrices.grads.data();
    ws.slopes = matrices.slopes.data();
    ws.inputs = factor(args_.layers[0].in, Side::kLeft);
    ws.head_grad = factor(2 * args_.dims, Side::kGrad);
    ws.gathered = ws.inputs.along;
    ws.head_slopes = ws.head_grad.along;
    if (args_.bfloat16) {
      ws.gathered = panels(args_.layers[0].in);
      ws.head_slopes = panels(2 * args_.dims);
    }
    ws.head = take_rows(arena_, rows, 2 * args_.dims);
    for (Rows* each : {&ws.targets, &ws.max_grad, &ws.min_grad}) *each = take_rows(arena_, rows, args_.dims);
    arena_.take(ws.loss, rows);
  }

  const FitArgs& args_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Dense> layers_;
  // A workspace for each thread, and one that they share; its matrices.
  std::vector<FitWorkspace> workspaces_;
  std::vector<Matrices> matrices_;
};

}  // namespace

double fit_steps(const FitArgs& args, const Kernels& kernels) {
  const int64_t blocks = (std::min(args.batch, args.count) + kernels.block - 1) / kernels.block;
  const int threads = static_cast<int>(std::min<int64_t>(args.threads, std::max(blocks, args.members)));
  FitState state(args, kernels, threads);
  const int64_t steps = (args.count + args.batch - 1) / args.batch;
  double loss = 0.0;
  Barrier barrier(threads);
  parallel(threads, [&](int thread) {
    const Team all{thread, threads, &barrier};
    const std::vector<Turn> members = turns(args.members, all);
    std::vector<AdamStep> layer_steps(args.depth);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t number = args.steps_before + step + 1;
      for (int64_t l = 0; l < args.depth; ++l)
        layer_steps[l] = adam_step(args.learning_rate, number, args.weight_decay[l], 0.0f);
      const int64_t begin = step * args.batch, count = std::min(args.batch, args.count - begin);
      for (const Turn& turn : members)
        kernels.fit_member(args, state.plan, state.workspace(turn.team, thread),
                           {turn.network, begin, count, turn.team}, layer_steps.data());
      all.wait();
      if (thread == 0) loss += state.step_bounds(adam_step(args.learning_rate, number, 0.0f, 0.0f));
      all.wait();
    }
  });
  state.write_back();
  return loss;
}

}  // namespace mopo
