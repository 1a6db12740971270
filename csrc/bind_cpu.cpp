// The Python module _cpu: addresses and sizes in, counts out. mopo_fast/backends/checked.py checks them
// first.
#include <system_error>

#include "bind.h"
#include "cpu/calls.h"
#include "cpu/dispatch.h"
#include "cpu/peak.h"
#include "philox.h"

namespace {

// (weight addresses, bias addresses, sizes, networks, activation, and the addresses of the hidden layers'
// norm scales and shifts). Sizes are in, hidden ..., out. Without layer norms there are no such addresses.
using NetworkTuple = std::tuple<std::vector<uintptr_t>, std::vector<uintptr_t>, std::vector<int64_t>, int64_t,
                                int, std::vector<uintptr_t>, std::vector<uintptr_t>>;

std::vector<mopo::NetworkLayer> layers(const NetworkTuple& network) {
  const auto& [weights, biases, sizes, networks, activation, scales, shifts] = network;
  std::vector<mopo::NetworkLayer> result;
  for (size_t l = 0; l < weights.size(); ++l) {
    const bool normed = l < scales.size();
    result.push_back({pointer<float>(weights[l]), pointer<float>(biases[l]), sizes[l], sizes[l + 1],
                      normed ? pointer<float>(scales[l]) : nullptr,
                      normed ? pointer<float>(shifts[l]) : nullptr});
  }
  return result;
}

mopo::Network network(const NetworkTuple& tuple, const std::vector<mopo::NetworkLayer>& layers) {
  return {layers.data(), static_cast<int64_t>(layers.size()), std::get<3>(tuple),
          static_cast<mopo::Activation>(std::get<4>(tuple))};
}

mopo::Packed pack(const NetworkTuple& tuple, const std::string& isa, int precision) {
  const mopo::Kernels& kernels = mopo::kernels(isa);
  const std::vector<mopo::NetworkLayer> own = layers(tuple);
  return {network(tuple, own), kernels.packings[precision]};
}

bool resembles(const mopo::Packed& packed, const NetworkTuple& tuple) {
  const std::vector<mopo::NetworkLayer> own = layers(tuple);
  return packed.resembles(network(tuple, own));
}

// Calls kernel(interrupt) without the interpreter's lock. A signal whose handler raises ends the call with
// that error.
template <class Kernel>
auto interruptible(Kernel kernel) {
  mopo::Interrupt interrupt([] {
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
  });
  const auto call = [&] {
    const py::gil_scoped_release release;
    return kernel(interrupt);
  };
  auto result = call();
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

std::tuple<int64_t, int64_t, int64_t> rollout(
    const std::string& isa, int64_t obs_dim, int64_t act_dim, const NetworkTuple& dynamics,
    const mopo::Packed& packed, uintptr_t input_mean, uintptr_t input_std, uintptr_t max_logvar,
    uintptr_t min_logvar, uintptr_t carry, bool log_std, uintptr_t elites, int64_t num_elites,
    uintptr_t penalty_members, int64_t num_penalty_members, const std::string& penalty, float penalty_coef,
    bool penalties, float truncate_at, bool halts, float halt_reward, bool keep_member, uintptr_t low,
    uintptr_t high, const NetworkTuple& policy, float log_std_min, float log_std_max, uintptr_t actions,
    int64_t batch, uintptr_t start, uintptr_t rows, int64_t horizon, uint32_t first_step, uint64_t seed,
    bool mean_actions, bool deterministic, int precision, bool keep_every_row,
    const std::vector<ArrayTuple>& out, int64_t capacity, int64_t head, uintptr_t mean, uintptr_t std,
    int threads) {
  const std::vector<mopo::NetworkLayer> dynamics_layers = layers(dynamics), policy_layers = layers(policy);
  mopo::RolloutArgs args{};
  args.obs_dim = obs_dim;
  args.act_dim = act_dim;
  args.dynamics = network(dynamics, dynamics_layers);
  args.input_mean = pointer<float>(input_mean);
  args.input_std = pointer<float>(input_std);
  args.max_logvar = pointer<float>(max_logvar);
  args.min_logvar = pointer<float>(min_logvar);
  args.carry = pointer<float>(carry);
  args.log_std = log_std;
  args.elites = pointer<int64_t>(elites);
  args.num_elites = num_elites;
  args.penalty_members = pointer<int64_t>(penalty_members);
  args.num_penalty_members = num_penalty_members;
  args.penalty = penalty_called(penalty);
  args.penalty_coef = penalty_coef;
  args.penalties = penalties;
  args.truncation = {truncate_at, halts, halt_reward};
  args.keep_member = keep_member;
  args.low = pointer<float>(low);
  args.high = pointer<float>(high);
  args.policy = network(policy, policy_layers);
  args.log_std_min = log_std_min;
  args.log_std_max = log_std_max;
  args.actions = pointer<float>(actions);
  args.batch = batch;
  args.start = pointer<float>(start);
  args.rows = pointer<int64_t>(rows);
  args.horizon = horizon;
  args.first_step = first_step;
  args.seed = seed;
  args.mean_actions = mean_actions;
  args.deterministic = deterministic;
  args.precision = static_cast<mopo::Precision>(precision);
  args.keep_every_row = keep_every_row;
  args.out = {array<float>(out[0]),   array<float>(out[1]),  array<float>(out[2]), array<float>(out[3]),
              array<bool>(out[4]),    array<float>(out[5]),  array<float>(out[6]), array<int32_t>(out[7]),
              array<int64_t>(out[8]), array<int32_t>(out[9])};
  args.capacity = capacity;
  args.head = head;
  args.mean = pointer<float>(mean);
  args.std = pointer<float>(std);
  args.threads = threads;
  const mopo::Kernels& kernels = mopo::kernels(isa);
  const mopo::RolloutCounts counts = interruptible(
      [&](mopo::Interrupt& interrupt) { return mopo::rollout(args, packed, kernels, interrupt); });
  return {counts.written, counts.non_finite, counts.truncated};
}

// False if it was interrupted.
bool least_values(const std::string& isa, int64_t obs_dim, int64_t act_dim, const NetworkTuple& policy,
                  const NetworkTuple& critics, float log_std_min, float log_std_max, uintptr_t mean,
                  uintptr_t std, int64_t samples, int64_t members, int64_t rows, uint64_t seed, int precision,
                  uintptr_t q, int threads) {
  const std::vector<mopo::NetworkLayer> policy_layers = layers(policy), critic_layers = layers(critics);
  mopo::ValuesArgs args{};
  args.obs_dim = obs_dim;
  args.act_dim = act_dim;
  args.policy = network(policy, policy_layers);
  args.critics = network(critics, critic_layers);
  args.log_std_min = log_std_min;
  args.log_std_max = log_std_max;
  args.mean = pointer<float>(mean);
  args.std = pointer<float>(std);
  args.samples = samples;
  args.members = members;
  args.rows = rows;
  args.seed = seed;
  args.precision = static_cast<mopo::Precision>(precision);
  args.q = pointer<float>(q);
  args.threads = threads;
  const mopo::Kernels& kernels = mopo::kernels(isa);
  return interruptible(
      [&](mopo::Interrupt& interrupt) { return mopo::least_values(args, kernels, interrupt); });
}

// Calls train(runs, interrupt) with `threads` threads for each run, then sets their counts of steps.
template <class Call, class Train>
auto train(const std::vector<Call*>& calls, int threads, Train train) {
  std::vector<decltype(Call::args)> runs;
  for (const Call* call : calls) {
    runs.push_back(call->args);
    runs.back().threads = threads;
  }
  auto result = interruptible([&](mopo::Interrupt& interrupt) { return train(runs, interrupt); });
  for (const Call* call : calls) call->count_steps();
  return result;
}

auto sac_updates(const std::vector<SacCall*>& calls, const std::string& isa, int threads) {
  return train(calls, threads, [&kernels = mopo::kernels(isa)](const auto& runs, mopo::Interrupt& interrupt) {
    return mopo::sac_updates(runs, kernels, interrupt);
  });
}

auto fit_steps(const std::vector<FitCall*>& calls, const std::string& isa, int threads) {
  return train(calls, threads, [&kernels = mopo::kernels(isa)](const auto& runs, mopo::Interrupt& interrupt) {
    return mopo::fit_steps(runs, kernels, interrupt);
  });
}

double multiply_adds(const std::string& isa, bool bfloat16, int64_t rounds, int threads) {
  return interruptible([&](mopo::Interrupt& interrupt) {
    return mopo::multiply_adds(mopo::kernels(isa), bfloat16, rounds, threads, interrupt);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using py::arg;
  // std::thread throws it where the system starts no more threads.
  py::register_local_exception<std::system_error>(module, "ThreadError");
  module.def("penalties", penalty_names, "Names of the penalties that the rollout has.");
  module.def("isas", mopo::supported_isas,
             "List the instruction sets that this processor can run, best first.");
  py::class_<mopo::Packed>(module, "Packed", py::module_local(),
                           "Weights in the layout of an instruction set's kernels; see csrc/cpu/packed.h.")
      .def("resembles", resembles, arg("network"),
           "Tell whether the biases of a network's last layer are those that were packed.");
  module.def("pack", pack, arg("network"), py::kw_only(), arg("isa"), arg("precision"),
             py::call_guard<py::gil_scoped_release>(), "Pack a network's weights for `rollout`.");
  module.def(
      "rollout", rollout, py::kw_only(), arg("isa"), arg("obs_dim"), arg("act_dim"), arg("dynamics"),
      arg("packed"), arg("input_mean"), arg("input_std"), arg("max_logvar"), arg("min_logvar"), arg("carry"),
      arg("log_std"), arg("elites"), arg("num_elites"), arg("penalty_members"), arg("num_penalty_members"),
      arg("penalty"), arg("penalty_coef"), arg("penalties"), arg("truncate_at"), arg("halts"),
      arg("halt_reward"), arg("keep_member"), arg("low"), arg("high"), arg("policy"), arg("log_std_min"),
      arg("log_std_max"), arg("actions"), arg("batch"), arg("start"), arg("rows"), arg("horizon"),
      arg("first_step"), arg("seed"), arg("mean_actions"), arg("deterministic"), arg("precision"),
      arg("keep_every_row"), arg("out"), arg("capacity"), arg("head"), arg("mean"), arg("std"),
      arg("threads"),
      "Run the fused rollout of csrc/rollout.h. Return (rows written, rollouts cut as not finite, rollouts "
      "truncated).");
  module.def("least_values", least_values, py::kw_only(), arg("isa"), arg("obs_dim"), arg("act_dim"),
             arg("policy"), arg("critics"), arg("log_std_min"), arg("log_std_max"), arg("mean"), arg("std"),
             arg("samples"), arg("members"), arg("rows"), arg("seed"), arg("precision"), arg("q"),
             arg("threads"),
             "Evaluate a policy at sampled states; the arguments are described in csrc/values.h.");
  bind_calls(module);
  module.def("sac_updates", sac_updates, arg("calls"), py::kw_only(), arg("isa"), arg("threads"),
             "Update runs in place, side by side, each on `threads` threads. Return sums of their metrics.");
  module.def(
      "fit_steps", fit_steps, arg("calls"), py::kw_only(), arg("isa"), arg("threads"),
      "Make the fit steps of runs in place, one run after the other. Return the sum of each run's losses.");
  module.def("multiply_adds", multiply_adds, py::kw_only(), arg("isa"), arg("bfloat16"), arg("rounds"),
             arg("threads"),
             "Make `rounds` rounds of multiply-adds on registers, to time the peak. Return their FLOP.");
  module.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, uint64_t key) {
        const mopo::PhiloxBlock block =
            mopo::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key);
        return std::array<uint32_t, 4>{block.word[0], block.word[1], block.word[2], block.word[3]};
      },
      arg("counter"), arg("key"),
      "Return the four words of one Philox4x32-10 block; for the known-answer test.");
  py::enum_<mopo::MathFunction>(module, "MathFunction")
      .value("exp", mopo::MathFunction::kExp)
      .value("log", mopo::MathFunction::kLog)
      .value("sin_turns", mopo::MathFunction::kSinTurns)
      .value("cos_turns", mopo::MathFunction::kCosTurns)
      .value("tanh", mopo::MathFunction::kTanh)
      .value("silu", mopo::MathFunction::kSilu)
      .value("silu_bfloat16", mopo::MathFunction::kSiluBFloat16)
      .value("silu_bfloat16x3", mopo::MathFunction::kSiluBFloat16x3)
      .value("reciprocal", mopo::MathFunction::kReciprocal)
      .value("sqrt", mopo::MathFunction::kSqrt);
  module.def(
      "math",
      [](const std::string& isa, mopo::MathFunction function, uintptr_t x, uintptr_t y, int64_t count) {
        mopo::kernels(isa).math(function, pointer<float>(x), pointer<float>(y), count);
      },
      arg("isa"), arg("function"), arg("x"), arg("y"), arg("count"),
      "Write function(x) to y; for the accuracy test.");
}
