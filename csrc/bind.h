// Shared by the two bindings: addresses as pointers, and the arguments of the kernels that train.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fit.h"
#include "sac.h"

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline std::vector<std::string> penalty_names() {
  return {std::begin(mopo::kPenaltyNames), std::end(mopo::kPenaltyNames)};
}

// The penalty of this name; Python asks for none that is not among penalty_names().
inline mopo::Penalty penalty_called(const std::string& name) {
  const auto begin = std::begin(mopo::kPenaltyNames), end = std::end(mopo::kPenaltyNames);
  const auto found = std::find(begin, end, name);
  if (found == end) throw std::invalid_argument("no such penalty: " + name);
  return static_cast<mopo::Penalty>(found - begin);
}

// (address, stride)
using ArrayTuple = std::pair<uintptr_t, int64_t>;

template <class T>
mopo::Array<T> array(const ArrayTuple& tuple) {
  return {pointer<T>(tuple.first), tuple.second};
}

// (in, out, addresses): of the weight's value, exp_avg, exp_avg_sq and target, then the bias's four.
using TrainedTuple = std::tuple<int64_t, int64_t, std::array<uintptr_t, 8>>;

inline std::vector<mopo::TrainedLayer> trained_layers(const std::vector<TrainedTuple>& tuples) {
  std::vector<mopo::TrainedLayer> result;
  for (const auto& [in, out, a] : tuples)
    result.push_back(
        {in,
         out,
         {pointer<float>(a[0]), pointer<float>(a[1]), pointer<float>(a[2]), pointer<float>(a[3])},
         {pointer<float>(a[4]), pointer<float>(a[5]), pointer<float>(a[6]), pointer<float>(a[7])}});
  return result;
}

inline mopo::Parameter parameter(const std::array<uintptr_t, 3>& a) {
  return {pointer<float>(a[0]), pointer<float>(a[1]), pointer<float>(a[2]), nullptr};
}

// Addresses of value, exp_avg and exp_avg_sq: the scale's, then the shift's.
using NormTuple = std::array<std::array<uintptr_t, 3>, 2>;

inline std::vector<mopo::TrainedNorm> trained_norms(const std::vector<NormTuple>& tuples) {
  std::vector<mopo::TrainedNorm> result;
  for (const auto& [scale, shift] : tuples) result.push_back({parameter(scale), parameter(shift)});
  return result;
}

// (arrays, size): observations, actions, rewards, next_observations and terminals.
using SourceTuple = std::tuple<std::array<ArrayTuple, 5>, int64_t>;

inline mopo::SacSource source(const SourceTuple& tuple) {
  const auto& [a, size] = tuple;
  return {array<const float>(a[0]), array<const float>(a[1]), array<const float>(a[2]),
          array<const float>(a[3]), array<const bool>(a[4]),  size};
}

// Adam's counts of steps. A finished call sets them before it returns to Python, together with the
// parameters: a signal handler could run before the next line of Python and see one without the other.
struct StepCounts {
  std::vector<uintptr_t> floats;  // addresses of a float for each parameter
  uintptr_t whole;                // address of an int64, or 0 for none

  void set(int64_t steps) const {
    for (const uintptr_t address : floats) *pointer<float>(address) = static_cast<float>(steps);
    if (whole != 0) *pointer<int64_t>(whole) = steps;
  }
};

// SacArgs with the arrays that they point to. Never copied: the pointers would lead to the original.
struct SacCall {
  SacCall(int64_t obs_dim, int64_t act_dim, int64_t critics, int64_t target_critics,
          const std::vector<TrainedTuple>& actor, const std::vector<TrainedTuple>& critic,
          const std::array<uintptr_t, 3>& log_alpha, const std::array<float, 3>& learning_rates,
          float discount, float polyak, float target_entropy, float log_std_min, float log_std_max,
          float log_prob_epsilon, float alpha_max, float critic_loss_scale, float target_min,
          bool entropy_backup, bool mean_actor, int order, double adam_epsilon, int precision,
          const SourceTuple& real, const SourceTuple& model, int64_t real_rows, int64_t model_rows,
          bool in_order, int64_t updates, int64_t updates_before, const std::vector<uintptr_t>& steps,
          uintptr_t count, int64_t first_draw, uint64_t seed)
      : actor(trained_layers(actor)), critic(trained_layers(critic)), counts{steps, count} {
    args.obs_dim = obs_dim;
    args.act_dim = act_dim;
    args.critics = critics;
    args.target_critics = target_critics;
    args.depth = static_cast<int64_t>(actor.size());
    args.actor = this->actor.data();
    args.critic = this->critic.data();
    args.log_alpha = parameter(log_alpha);
    args.actor_learning_rate = learning_rates[0];
    args.critic_learning_rate = learning_rates[1];
    args.alpha_learning_rate = learning_rates[2];
    args.discount = discount;
    args.polyak = polyak;
    args.target_entropy = target_entropy;
    args.log_std_min = log_std_min;
    args.log_std_max = log_std_max;
    args.log_prob_epsilon = log_prob_epsilon;
    args.alpha_max = alpha_max;
    args.critic_loss_scale = critic_loss_scale;
    args.target_min = target_min;
    args.entropy_backup = entropy_backup;
    args.mean_actor = mean_actor;
    args.order = static_cast<mopo::SacOrder>(order);
    args.adam_epsilon = adam_epsilon;
    args.precision = static_cast<mopo::Precision>(precision);
    args.real = source(real);
    args.model = source(model);
    args.real_rows = real_rows;
    args.model_rows = model_rows;
    args.in_order = in_order;
    args.updates = updates;
    args.updates_before = updates_before;
    args.first_draw = first_draw;
    args.seed = seed;
  }
  SacCall(const SacCall&) = delete;

  void count_steps() const { counts.set(args.updates_before + args.updates); }

  std::vector<mopo::TrainedLayer> actor, critic;
  StepCounts counts;
  mopo::SacArgs args{};
};

// FitArgs with the arrays that they point to. Never copied, for the same reason.
struct FitCall {
  FitCall(int64_t members, int64_t dims, const std::vector<TrainedTuple>& layers,
          const std::vector<NormTuple>& norms, int activation, const std::array<uintptr_t, 3>& max_logvar,
          const std::array<uintptr_t, 3>& min_logvar, uintptr_t inputs, uintptr_t targets, int64_t stride,
          uintptr_t rows, int64_t count, int64_t rows_stride, int64_t batch, float learning_rate,
          float logvar_bound_weight, const std::vector<float>& weight_decay, int64_t steps_before,
          const std::vector<uintptr_t>& steps, int precision)
      : layers(trained_layers(layers)),
        norms(trained_norms(norms)),
        weight_decay(weight_decay),
        counts{steps, 0} {
    args.members = members;
    args.depth = static_cast<int64_t>(layers.size());
    args.dims = dims;
    args.layers = this->layers.data();
    args.norms = norms.empty() ? nullptr : this->norms.data();
    args.activation = static_cast<mopo::Activation>(activation);
    args.max_logvar = parameter(max_logvar);
    args.min_logvar = parameter(min_logvar);
    args.inputs = pointer<float>(inputs);
    args.targets = pointer<float>(targets);
    args.stride = stride;
    args.rows = pointer<int32_t>(rows);
    args.count = count;
    args.rows_stride = rows_stride;
    args.batch = batch;
    args.learning_rate = learning_rate;
    args.logvar_bound_weight = logvar_bound_weight;
    args.weight_decay = this->weight_decay.data();
    args.steps_before = steps_before;
    args.precision = static_cast<mopo::Precision>(precision);
  }
  FitCall(const FitCall&) = delete;

  void count_steps() const { counts.set(args.steps_before + (args.count + args.batch - 1) / args.batch); }

  std::vector<mopo::TrainedLayer> layers;
  std::vector<mopo::TrainedNorm> norms;
  std::vector<float> weight_decay;
  StepCounts counts;
  mopo::FitArgs args{};
};

// The classes are local to the module: each of the two extensions defines its own.
inline void bind_calls(py::module_& module) {
  using py::arg;
  py::class_<SacCall>(module, "SacCall", py::module_local(),
                      "SAC updates of one run; the arguments are described in csrc/sac.h.")
      .def(
          py::init<int64_t, int64_t, int64_t, int64_t, const std::vector<TrainedTuple>&,
                   const std::vector<TrainedTuple>&, const std::array<uintptr_t, 3>&,
                   const std::array<float, 3>&, float, float, float, float, float, float, float, float, float,
                   bool, bool, int, double, int, const SourceTuple&, const SourceTuple&, int64_t, int64_t,
                   bool, int64_t, int64_t, const std::vector<uintptr_t>&, uintptr_t, int64_t, uint64_t>(),
          py::kw_only(), arg("obs_dim"), arg("act_dim"), arg("critics"), arg("target_critics"), arg("actor"),
          arg("critic"), arg("log_alpha"), arg("learning_rates"), arg("discount"), arg("polyak"),
          arg("target_entropy"), arg("log_std_min"), arg("log_std_max"), arg("log_prob_epsilon"),
          arg("alpha_max"), arg("critic_loss_scale"), arg("target_min"), arg("entropy_backup"),
          arg("mean_actor"), arg("order"), arg("adam_epsilon"), arg("precision"), arg("real"), arg("model"),
          arg("real_rows"), arg("model_rows"), arg("in_order"), arg("updates"), arg("updates_before"),
          arg("steps"), arg("count"), arg("first_draw"), arg("seed"));
  py::class_<FitCall>(module, "FitCall", py::module_local(),
                      "Fit steps of one run; the arguments are described in csrc/fit.h.")
      .def(py::init<int64_t, int64_t, const std::vector<TrainedTuple>&, const std::vector<NormTuple>&, int,
                    const std::array<uintptr_t, 3>&, const std::array<uintptr_t, 3>&, uintptr_t, uintptr_t,
                    int64_t, uintptr_t, int64_t, int64_t, int64_t, float, float, const std::vector<float>&,
                    int64_t, const std::vector<uintptr_t>&, int>(),
           py::kw_only(), arg("members"), arg("dims"), arg("layers"), arg("norms"), arg("activation"),
           arg("max_logvar"), arg("min_logvar"), arg("inputs"), arg("targets"), arg("stride"), arg("rows"),
           arg("count"), arg("rows_stride"), arg("batch"), arg("learning_rate"), arg("logvar_bound_weight"),
           arg("weight_decay"), arg("steps_before"), arg("steps"), arg("precision"));
}
