// A call of fit steps: its memory, and the members' turns on teams of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <vector>

#include "barrier.h"
#include "calls.h"
#include "denormals.h"
#include "pool.h"
#include "training.h"

namespace mopo {
namespace {

// `count` teams of `size` threads: the smallest teams that leave the fewest threads idle.
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

// The rows of a batch, padding included.
int64_t batch_rows(const FitArgs& args, const Kernels& kernels) {
  return round_up(std::min(args.batch, args.count), granule(args.precision, kernels));
}

// A run's memory: parameters in the kernels' layout, and a workspace for each team.
class FitState {
 public:
  FitState(const FitArgs& args, const Kernels& kernels, Teams teams)
      : workspaces(teams.count),
        args_(args),
        kernels_(kernels),
        matrices_(teams.count),
        windows_(teams.count, std::vector<FitWindow>(teams.size)),
        panels_(teams.count * teams.size),
        inverse_stds_(teams.count * teams.size) {
    lay_out();
    arena_.allocate_zeroed();
    lay_out();
    visit([&](const TrainedLayer& layer, int64_t member, const Dense& dense) {
      read_parameters(layer, member, dense, args_.precision, kernels_);
    });
    visit_norms([](const float* theirs, float* ours, int64_t count) { std::copy_n(theirs, count, ours); });
    copy_bound(args.max_logvar, max_logvar_);
    copy_bound(args.min_logvar, min_logvar_);
    read_bounds();
  }

  void write_back() {
    visit([&](const TrainedLayer& layer, int64_t member, const Dense& dense) {
      write_parameters(layer, member, dense, kernels_);
    });
    visit_norms([](float* theirs, const float* ours, int64_t count) { std::copy_n(ours, count, theirs); });
    copy_bound(max_logvar_, args_.max_logvar);
    copy_bound(min_logvar_, args_.min_logvar);
  }

  // Steps the bounds by the gradients of all members, in the members' order. Returns the loss of the whole
  // step.
  double step_bounds(const AdamStep& step) {
    double loss = 0.0;
    for (int64_t member = 0; member < args_.members; ++member) loss += plan.loss[member];
    for (int64_t d = 0; d < args_.dims; ++d) {
      loss += args_.logvar_bound_weight * (max_logvar_.value[d] - min_logvar_.value[d]);
      double max_grad = args_.logvar_bound_weight, min_grad = -args_.logvar_bound_weight;
      for (int64_t member = 0; member < args_.members; ++member) {
        max_grad += plan.max_grad[member * args_.dims + d];
        min_grad += plan.min_grad[member * args_.dims + d];
      }
      adam(step, max_logvar_, d, max_grad);
      adam(step, min_logvar_, d, min_grad);
    }
    read_bounds();
    return loss;
  }

  FitPlan plan{};
  std::vector<FitWorkspace> workspaces;  // one for each team

 private:
  struct Matrices {
    std::vector<Factor> hidden, grads;
    std::vector<Rows> scale_grads, shift_grads;
  };
  struct WindowPanels {
    std::vector<Panels> slopes, normed;
  };

  template <class Visit>
  void visit(Visit function) {
    for (int64_t member = 0; member < args_.members; ++member)
      for (int64_t l = 0; l < args_.depth; ++l)
        function(args_.layers[l], member, layers_[member * args_.depth + l]);
  }

  int64_t hidden() const { return args_.depth - 1; }

  // Calls function(theirs, ours, count) for each array of each layer norm.
  template <class Visit>
  void visit_norms(Visit function) {
    for (size_t i = 0; i < norms_.size(); ++i) {
      const int64_t member = static_cast<int64_t>(i) / hidden(), l = static_cast<int64_t>(i) % hidden();
      const int64_t count = args_.layers[l].out;
      const auto pair = [&](const Parameter& theirs, const NormArray& ours) {
        function(theirs.value + member * count, ours.value, count);
        function(theirs.exp_avg + member * count, ours.exp_avg, count);
        function(theirs.exp_avg_sq + member * count, ours.exp_avg_sq, count);
      };
      pair(args_.norms[l].scale, norms_[i].scale);
      pair(args_.norms[l].shift, norms_[i].shift);
    }
  }

  void read_bounds() {
    for (int64_t d = 0; d < args_.dims; ++d) {
      plan.max_logvar[d] = max_logvar_.value[d];
      plan.exp_minus_max[d] = std::exp(-max_logvar_.value[d]);
      plan.exp_min[d] = std::exp(min_logvar_.value[d]);
    }
  }

  void copy_bound(const Parameter& from, const Parameter& to) const {
    std::copy_n(from.value, args_.dims, to.value);
    std::copy_n(from.exp_avg, args_.dims, to.exp_avg);
    std::copy_n(from.exp_avg_sq, args_.dims, to.exp_avg_sq);
  }

  void lay_out() {
    layers_.clear();
    for (int64_t member = 0; member < args_.members; ++member)
      for (int64_t l = 0; l < args_.depth; ++l)
        layers_.push_back(take_dense(arena_, args_.layers[l], l > 0, args_.precision, kernels_));
    plan.layers = layers_.data();
    norms_.assign(args_.norms == nullptr ? 0 : args_.members * hidden(), {});
    for (size_t i = 0; i < norms_.size(); ++i)
      for (NormArray* array : {&norms_[i].scale, &norms_[i].shift})
        for (float** each : {&array->value, &array->exp_avg, &array->exp_avg_sq})
          arena_.take(*each, round_up(args_.layers[static_cast<int64_t>(i) % hidden()].out, kernels_.panel));
    plan.norms = norms_.empty() ? nullptr : norms_.data();
    const int64_t dims = round_up(args_.dims, kernels_.panel);
    for (float** each : {&plan.max_logvar, &plan.exp_minus_max, &plan.exp_min}) arena_.take(*each, dims);
    for (Parameter* bound : {&max_logvar_, &min_logvar_})
      for (float** each : {&bound->value, &bound->exp_avg, &bound->exp_avg_sq}) arena_.take(*each, dims);
    arena_.take(plan.loss, args_.members);
    for (double** each : {&plan.max_grad, &plan.min_grad}) arena_.take(*each, args_.members * args_.dims);
    for (size_t team = 0; team < workspaces.size(); ++team) {
      lay_out(workspaces[team], matrices_[team]);
      std::vector<FitWindow>& windows = windows_[team];
      workspaces[team].windows = windows.data();
      for (size_t part = 0; part < windows.size(); ++part)
        lay_out(windows[part], team * windows.size() + part);
    }
  }

  void lay_out(FitWorkspace& ws, Matrices& matrices) {
    const int64_t rows = batch_rows(args_, kernels_);
    const auto factor = [&](int64_t width, Side side) {
      if (in_tiles(args_.precision, kernels_))
        return Factor{{}, take_across(arena_, rows, width, side, args_.precision, kernels_)};
      return take_factor(arena_, rows, width, side, args_.precision, kernels_);
    };
    matrices = {};
    for (int64_t l = 0; l + 1 < args_.depth; ++l) {
      matrices.hidden.push_back(factor(args_.layers[l].out, Side::kLeft));
      matrices.grads.push_back(factor(args_.layers[l].out, Side::kGrad));
    }
    ws.hidden = matrices.hidden.data();
    ws.grads = matrices.grads.data();
    ws.inputs = factor(args_.layers[0].in, Side::kLeft);
    ws.head_grad = factor(2 * args_.dims, Side::kGrad);
    for (Rows* each : {&ws.max_grad, &ws.min_grad}) *each = take_rows(arena_, rows, args_.dims);
    arena_.take(ws.loss, rows);
    if (args_.norms == nullptr) return;
    const int64_t sums = rows / granule(args_.precision, kernels_);
    for (std::vector<Rows>* grads : {&matrices.scale_grads, &matrices.shift_grads})
      for (int64_t l = 0; l < hidden(); ++l)
        grads->push_back(take_rows(arena_, sums, round_up(args_.layers[l].out, kernels_.panel)));
    ws.scale_grads = matrices.scale_grads.data();
    ws.shift_grads = matrices.shift_grads.data();
  }

  void lay_out(FitWindow& window, size_t thread) {
    const int64_t rows = std::min(kFitWindow, batch_rows(args_, kernels_));
    const int64_t lanes = round_up(rows, kernels_.panel);  // rows in whole vectors
    const auto panels = [&](int64_t width) { return take_panels(arena_, rows, width, kernels_); };
    auto& [slopes, normed] = panels_[thread];
    std::vector<float*>& inverse_stds = inverse_stds_[thread];
    slopes.clear();
    normed.clear();
    inverse_stds.clear();
    int64_t widest = 2 * args_.dims;
    for (int64_t l = 0; l + 1 < args_.depth; ++l) {
      slopes.push_back(panels(args_.layers[l].out));
      widest = std::max({widest, args_.layers[l].in, args_.layers[l].out});
      if (args_.norms == nullptr) continue;
      normed.push_back(panels(args_.layers[l].out));
      arena_.take(inverse_stds.emplace_back(), lanes);
    }
    window.slopes = slopes.data();
    window.normed = normed.data();
    window.inverse_std = inverse_stds.data();
    if (args_.norms != nullptr) {
      for (Rows& sums : window.sums) sums = take_rows(arena_, lanes, kernels_.panel);
      for (float*& means : window.means) arena_.take(means, lanes);
    }
    window.head = take_rows(arena_, rows, 2 * args_.dims);
    window.targets = take_rows(arena_, rows, args_.dims);
    if (args_.precision == Precision::kFloat32) return;
    window.gathered = panels(args_.layers[0].in);
    window.head_grad = panels(2 * args_.dims);
    if (!in_tiles(args_.precision, kernels_)) return;
    for (Panels(*each)[2] : {&window.left, &window.grad})
      for (Panels& buffer : *each) buffer = take_along(arena_, rows, widest, args_.precision, kernels_);
  }

  const FitArgs& args_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Dense> layers_;
  std::vector<Norm> norms_;
  Parameter max_logvar_{}, min_logvar_{};
  // The arrays that the workspaces, their windows and these point to.
  std::vector<Matrices> matrices_;
  std::vector<std::vector<FitWindow>> windows_;
  std::vector<WindowPanels> panels_;
  std::vector<std::vector<float*>> inverse_stds_;
};

// One run of a call: its memory, its teams and the sum of its losses.
//
// A turn is one member's step. Turns are numbered step by step, member by member, and dealt out to the teams
// in that order, so that seven members keep two teams busy. A turn waits for the member's turn in the step
// before, and for the bounds, which that step's losses of all members have moved; for nothing else.
class FitWork {
 public:
  FitWork(const FitArgs& args, const Kernels& kernels)
      : args(args),
        teams(make_teams(args.threads, args.members,
                         batch_rows(args, kernels) / granule(args.precision, kernels))),
        state(args, kernels, teams),
        adam_steps_(teams.size * teams.count, std::vector<AdamStep>(args.depth)),
        idle_(teams.count),
        trained_(args.members) {
    for (int team = 0; team < teams.count; ++team) barriers_.emplace_back(teams.size);
  }

  void run(const Kernels& kernels, Interrupt& interrupt) {
    parallel(teams.size * teams.count, [&](int thread) { work(kernels, interrupt, thread); }, interrupt);
  }

  const FitArgs& args;
  const Teams teams;
  FitState state;
  double loss = 0.0;

 private:
  void work(const Kernels& kernels, Interrupt& interrupt, int thread) {
    const FlushDenormals flush;
    const int64_t members = args.members, steps = (args.count + args.batch - 1) / args.batch;
    const int number = thread / teams.size;
    const Team team{thread % teams.size, teams.size, &barriers_[number]};
    const FitWorkspace& workspace = state.workspaces[number];
    std::vector<AdamStep>& layer_steps = adam_steps_[thread];
    for (int64_t i = number; i < steps * members; i += teams.count) {
      const int64_t step = i / members, member = i % members, begin = step * args.batch;
      const int64_t adam_number = args.steps_before + step + 1;
      for (int64_t l = 0; l < args.depth; ++l)
        layer_steps[l] = adam_step(args.learning_rate, adam_number, args.weight_decay[l], 0.0f);
      const FitTurn turn{member, begin, std::min(args.batch, args.count - begin), team};
      trained_[member].wait_for(step);
      bounds_.wait_for(step);
      if (stop_) return;
      // An interrupted call changes nothing, so the turns that are left in this step are only counted.
      if (team.part == 0) idle_[number] = interrupt.requested();
      team.wait();
      const bool idle = idle_[number];
      if (!idle) kernels.fit_rows(args, state.plan, workspace, turn);
      if (team.part == 0 && losses_.fetch_add(1, std::memory_order_acq_rel) + 1 == (step + 1) * members) {
        loss += state.step_bounds(adam_step(args.learning_rate, adam_number, 0.0f, 0.0f));
        stop_ = interrupt.requested();
        bounds_.reach(step + 1);
      }
      if (!idle) kernels.fit_parameters(args, state.plan, workspace, turn, layer_steps.data());
      if (team.part == 0) trained_[member].reach(step + 1);
      interrupt.requested();
    }
  }

  std::vector<std::vector<AdamStep>> adam_steps_;  // [threads][depth], for the current turn
  std::deque<Barrier> barriers_;                   // [teams]
  std::vector<std::atomic<bool>> idle_;            // [teams], true once the call is interrupted
  std::vector<Milestone> trained_;
  Milestone bounds_;
  std::atomic<int64_t> losses_{0};
  bool stop_ = false;  // written by the thread that ends a step, before it announces this by `bounds_`
};

}  // namespace

std::vector<double> fit_steps(const std::vector<FitArgs>& runs, const Kernels& kernels,
                              Interrupt& interrupt) {
  // All memory is taken before the threads start, so that nothing can fail in them.
  std::deque<FitWork> works;
  for (const FitArgs& args : runs) works.emplace_back(args, kernels);
  std::vector<double> losses;
  // One run after the other: each keeps every core busy.
  for (FitWork& work : works) work.run(kernels, interrupt);
  if (interrupt.requested()) return losses;
  for (FitWork& work : works) {
    work.state.write_back();
    losses.push_back(work.loss);
  }
  return losses;
}

}  // namespace mopo
