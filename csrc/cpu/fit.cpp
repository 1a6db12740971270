#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
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
  FitState(const FitArgs& args, const Kernels& kernels, int teams)
      : workspaces(teams), args_(args), kernels_(kernels), matrices_(teams) {
    lay_out();
    arena_.allocate_zeroed();
    lay_out();
    visit([&](const TrainedLayer& layer, int64_t member, const Dense& dense) {
      read_parameters(layer, member, dense, args_.bfloat16, kernels_);
    });
    read_bounds();
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
  std::vector<FitWorkspace> workspaces;  // a team's each

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
    for (size_t team = 0; team < workspaces.size(); ++team) lay_out(workspaces[team], matrices_[team]);
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
    ws.head_floats = ws.head_grad.along;
    if (args_.bfloat16) {
      ws.gathered = panels(args_.layers[0].in);
      ws.head_floats = panels(2 * args_.dims);
    }
    ws.head = take_rows(arena_, rows, 2 * args_.dims);
    for (Rows* each : {&ws.targets, &ws.max_grad, &ws.min_grad}) *each = take_rows(arena_, rows, args_.dims);
    arena_.take(ws.loss, rows);
  }

  const FitArgs& args_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Dense> layers_;
  std::vector<Matrices> matrices_;  // of the workspaces
};

// How the threads work together: the smallest teams that leave the fewest idle.
struct Teams {
  int size, count;
};
Teams make_teams(int64_t threads, int64_t members, int64_t blocks) {
  Teams best{1, 1};
  for (int64_t size = 1; size <= std::min(threads, blocks); ++size) {
    const int64_t count = std::min(threads / size, members);
    if (size * count > best.size * best.count) best = {static_cast<int>(size), static_cast<int>(count)};
  }
  return best;
}

}  // namespace

// Members take turns, step after step, and teams take the turns one after the other, so that seven members
// keep two teams busy. A member's turn waits for its last one, and for the bounds, which the losses of all
// members in the step before have moved.
double fit_steps(const FitArgs& args, const Kernels& kernels) {
  const int64_t members = args.members, steps = (args.count + args.batch - 1) / args.batch;
  const int64_t block = args.bfloat16 ? std::max(kernels.block, kernels.tile) : kernels.block;
  const Teams teams =
      make_teams(args.threads, members, round_up(std::min(args.batch, args.count), block) / block);
  const int threads = teams.size * teams.count;
  FitState state(args, kernels, teams.count);
  // All memory is taken before the threads start, so that nothing can fail in them.
  std::vector<std::vector<AdamStep>> adam_steps(threads, std::vector<AdamStep>(args.depth));
  std::deque<Barrier> barriers;
  for (int team = 0; team < teams.count; ++team) barriers.emplace_back(teams.size);
  std::vector<Milestone> trained(members);
  Milestone bounds;
  std::atomic<int64_t> losses{0};
  double loss = 0.0;
  parallel(threads, [&](int thread) {
    const int number = thread / teams.size;
    const Team team{thread % teams.size, teams.size, &barriers[number]};
    const FitWorkspace& workspace = state.workspaces[number];
    std::vector<AdamStep>& layer_steps = adam_steps[thread];
    for (int64_t i = number; i < steps * members; i += teams.count) {
      const int64_t step = i / members, member = i % members, begin = step * args.batch;
      const int64_t adam_number = args.steps_before + step + 1;
      for (int64_t l = 0; l < args.depth; ++l)
        layer_steps[l] = adam_step(args.learning_rate, adam_number, args.weight_decay[l], 0.0f);
      const FitTurn turn{member, begin, std::min(args.batch, args.count - begin), team};
      trained[member].wait_for(step);
      bounds.wait_for(step);
      kernels.fit_forward(args, state.plan, workspace, turn);
      if (team.part == 0 && losses.fetch_add(1, std::memory_order_acq_rel) + 1 == (step + 1) * members) {
        loss += state.step_bounds(adam_step(args.learning_rate, adam_number, 0.0f, 0.0f));
        bounds.reach(step + 1);
      }
      kernels.fit_backward(args, state.plan, workspace, turn, layer_steps.data());
      if (team.part == 0) trained[member].reach(step + 1);
    }
  });
  state.write_back();
  return loss;
}

}  // namespace mopo
