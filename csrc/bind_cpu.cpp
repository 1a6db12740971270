// pybind11: addresses and sizes in, counts out. Nothing is checked here; mopo_fast/backends/cpu.py has done
// it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/arena.h"
#include "cpu/dispatch.h"
#include "philox.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, stride)
using ArrayTuple = std::pair<uintptr_t, int64_t>;

template <class T>
mopo::Array<T> array(const ArrayTuple& tuple) {
  return {pointer<T>(tuple.first), tuple.second};
}

// (weight addresses, bias addresses, sizes: in, hidden, ..., out, networks, activation)
using NetworkTuple =
    std::tuple<std::vector<uintptr_t>, std::vector<uintptr_t>, std::vector<int64_t>, int64_t, int>;

std::vector<mopo::Layer> layers(const NetworkTuple& network) {
  const auto& [weights, biases, sizes, networks, activation] = network;
  std::vector<mopo::Layer> result;
  for (size_t l = 0; l < weights.size(); ++l)
    result.push_back({pointer<float>(weights[l]), pointer<float>(biases[l]), sizes[l], sizes[l + 1]});
  return result;
}

mopo::Network network(const NetworkTuple& tuple, const std::vector<mopo::Layer>& layers) {
  return {layers.data(), static_cast<int64_t>(layers.size()), std::get<3>(tuple),
          static_cast<mopo::Activation>(std::get<4>(tuple))};
}

std::pair<int64_t, int64_t> rollout(const std::string& isa, int64_t obs_dim, int64_t act_dim,
                                    const NetworkTuple& dynamics, uintptr_t input_mean, uintptr_t input_std,
                                    uintptr_t max_logvar, uintptr_t min_logvar, uintptr_t elites,
                                    int64_t num_elites, uintptr_t penalty_members,
                                    int64_t num_penalty_members, int penalty, float penalty_coef,
                                    uintptr_t low, uintptr_t high, const NetworkTuple& policy,
                                    float log_std_min, float log_std_max, uintptr_t actions, int64_t batch,
                                    uintptr_t start, uintptr_t rows, int64_t horizon, uint32_t first_step,
                                    uint64_t seed, bool deterministic, bool bfloat16, bool keep_every_row,
                                    const std::vector<ArrayTuple>& out, int64_t capacity, int64_t head,
                                    uintptr_t mean, uintptr_t std, int threads) {
  const std::vector<mopo::Layer> dynamics_layers = layers(dynamics), policy_layers = layers(policy);
  mopo::RolloutArgs args{};
  args.obs_dim = obs_dim;
  args.act_dim = act_dim;
  args.dynamics = network(dynamics, dynamics_layers);
  args.input_mean = pointer<float>(input_mean);
  args.input_std = pointer<float>(input_std);
  args.max_logvar = pointer<float>(max_logvar);
  args.min_logvar = pointer<float>(min_logvar);
  args.elites = pointer<int64_t>(elites);
  args.num_elites = num_elites;
  args.penalty_members = pointer<int64_t>(penalty_members);
  args.num_penalty_members = num_penalty_members;
  args.penalty = static_cast<mopo::Penalty>(penalty);
  args.penalty_coef = penalty_coef;
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
  args.deterministic = deterministic;
  args.bfloat16 = bfloat16;
  args.keep_every_row = keep_every_row;
  args.out = {array<float>(out[0]),   array<float>(out[1]),  array<float>(out[2]), array<float>(out[3]),
              array<bool>(out[4]),    array<float>(out[5]),  array<float>(out[6]), array<int32_t>(out[7]),
              array<int64_t>(out[8]), array<int32_t>(out[9])};
  args.capacity = capacity;
  args.head = head;
  args.mean = pointer<float>(mean);
  args.std = pointer<float>(std);
  args.threads = threads;
  const py::gil_scoped_release release;
  const mopo::RolloutCounts counts = mopo::rollout(args, mopo::kernels(isa));
  return {counts.written, counts.non_finite};
}

// (in, out, addresses of the weight's value, exp_avg, exp_avg_sq and target, then of the bias's)
using TrainedTuple = std::tuple<int64_t, int64_t, std::array<uintptr_t, 8>>;

std::vector<mopo::TrainedLayer> trained_layers(const std::vector<TrainedTuple>& tuples) {
  std::vector<mopo::TrainedLayer> result;
  for (const auto& [in, out, a] : tuples)
    result.push_back(
        {in,
         out,
         {pointer<float>(a[0]), pointer<float>(a[1]), pointer<float>(a[2]), pointer<float>(a[3])},
         {pointer<float>(a[4]), pointer<float>(a[5]), pointer<float>(a[6]), pointer<float>(a[7])}});
  return result;
}

mopo::Parameter parameter(const std::array<uintptr_t, 3>& a) {
  return {pointer<float>(a[0]), pointer<float>(a[1]), pointer<float>(a[2]), nullptr};
}

// (observations, actions, rewards, next_observations and terminals, size)
using SourceTuple = std::tuple<std::array<ArrayTuple, 5>, int64_t>;

mopo::SacSource source(const SourceTuple& tuple) {
  const auto& [a, size] = tuple;
  return {array<const float>(a[0]), array<const float>(a[1]), array<const float>(a[2]),
          array<const float>(a[3]), array<const bool>(a[4]),  size};
}

std::array<double, mopo::kSacMetrics> sac_updates(
    const std::string& isa, int64_t obs_dim, int64_t act_dim, int64_t critics,
    const std::vector<TrainedTuple>& actor, const std::vector<TrainedTuple>& critic,
    const std::array<uintptr_t, 3>& log_alpha, const std::array<float, 3>& learning_rates, float discount,
    float polyak, float target_entropy, float log_std_min, float log_std_max, float alpha_max,
    float critic_loss_scale, bool simultaneous, const SourceTuple& real, const SourceTuple& model,
    int64_t real_rows, int64_t model_rows, int64_t updates, int64_t updates_before, int64_t first_draw,
    uint64_t seed, int threads) {
  const std::vector<mopo::TrainedLayer> actor_layers = trained_layers(actor),
                                        critic_layers = trained_layers(critic);
  mopo::SacArgs args{};
  args.obs_dim = obs_dim;
  args.act_dim = act_dim;
  args.critics = critics;
  args.depth = static_cast<int64_t>(actor_layers.size());
  args.actor = actor_layers.data();
  args.critic = critic_layers.data();
  args.log_alpha = parameter(log_alpha);
  args.actor_learning_rate = learning_rates[0];
  args.critic_learning_rate = learning_rates[1];
  args.alpha_learning_rate = learning_rates[2];
  args.discount = discount;
  args.polyak = polyak;
  args.target_entropy = target_entropy;
  args.log_std_min = log_std_min;
  args.log_std_max = log_std_max;
  args.alpha_max = alpha_max;
  args.critic_loss_scale = critic_loss_scale;
  args.simultaneous = simultaneous;
  args.real = source(real);
  args.model = source(model);
  args.real_rows = real_rows;
  args.model_rows = model_rows;
  args.updates = updates;
  args.updates_before = updates_before;
  args.first_draw = first_draw;
  args.seed = seed;
  args.threads = threads;
  const py::gil_scoped_release release;
  return mopo::sac_updates(args, mopo::kernels(isa));
}

double fit_steps(const std::string& isa, int64_t members, int64_t dims,
                 const std::vector<TrainedTuple>& layers, int activation,
                 const std::array<uintptr_t, 3>& max_logvar, const std::array<uintptr_t, 3>& min_logvar,
                 uintptr_t inputs, uintptr_t targets, int64_t stride, uintptr_t rows, int64_t count,
                 int64_t rows_stride, int64_t batch, float learning_rate, float logvar_bound_weight,
                 const std::vector<float>& weight_decay, int64_t steps_before, bool bfloat16, int threads) {
  const std::vector<mopo::TrainedLayer> trained = trained_layers(layers);
  mopo::FitArgs args{};
  args.members = members;
  args.depth = static_cast<int64_t>(trained.size());
  args.dims = dims;
  args.layers = trained.data();
  args.activation = static_cast<mopo::Activation>(activation);
  args.max_logvar = parameter(max_logvar);
  args.min_logvar = parameter(min_logvar);
  args.inputs = pointer<float>(inputs);
  args.targets = pointer<float>(targets);
  args.stride = stride;
  args.rows = pointer<int64_t>(rows);
  args.count = count;
  args.rows_stride = rows_stride;
  args.batch = batch;
  args.learning_rate = learning_rate;
  args.logvar_bound_weight = logvar_bound_weight;
  args.weight_decay = weight_decay.data();
  args.steps_before = steps_before;
  args.bfloat16 = bfloat16;
  args.threads = threads;
  const py::gil_scoped_release release;
  return mopo::fit_steps(args, mopo::kernels(isa));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using py::arg;
  module.def("isas", mopo::supported_isas, "Instruction sets that this processor can run, best first.");
  module.def("rollout", rollout, py::kw_only(), arg("isa"), arg("obs_dim"), arg("act_dim"), arg("dynamics"),
             arg("input_mean"), arg("input_std"), arg("max_logvar"), arg("min_logvar"), arg("elites"),
             arg("num_elites"), arg("penalty_members"), arg("num_penalty_members"), arg("penalty"),
             arg("penalty_coef"), arg("low"), arg("high"), arg("policy"), arg("log_std_min"),
             arg("log_std_max"), arg("actions"), arg("batch"), arg("start"), arg("rows"), arg("horizon"),
             arg("first_step"), arg("seed"), arg("deterministic"), arg("bfloat16"), arg("keep_every_row"),
             arg("out"), arg("capacity"), arg("head"), arg("mean"), arg("std"), arg("threads"),
             "The fused rollout; see csrc/rollout.h. Gives (rows written, rollouts cut as not finite).");
  module.def("sac_updates", sac_updates, py::kw_only(), arg("isa"), arg("obs_dim"), arg("act_dim"),
             arg("critics"), arg("actor"), arg("critic"), arg("log_alpha"), arg("learning_rates"),
             arg("discount"), arg("polyak"), arg("target_entropy"), arg("log_std_min"), arg("log_std_max"),
             arg("alpha_max"), arg("critic_loss_scale"), arg("simultaneous"), arg("real"), arg("model"),
             arg("real_rows"), arg("model_rows"), arg("updates"), arg("updates_before"), arg("first_draw"),
             arg("seed"), arg("threads"), "SAC updates in place; see csrc/sac.h. Gives sums of the metrics.");
  module.def("fit_steps", fit_steps, py::kw_only(), arg("isa"), arg("members"), arg("dims"), arg("layers"),
             arg("activation"), arg("max_logvar"), arg("min_logvar"), arg("inputs"), arg("targets"),
             arg("stride"), arg("rows"), arg("count"), arg("rows_stride"), arg("batch"), arg("learning_rate"),
             arg("logvar_bound_weight"), arg("weight_decay"), arg("steps_before"), arg("bfloat16"),
             arg("threads"), "Steps of the fit in place; see csrc/fit.h. Gives the sum of their losses.");
  module.def(
      "use_large_pages",
      [](uintptr_t address, size_t bytes) { mopo::use_large_pages(pointer<char>(address), bytes); },
      arg("address"), arg("bytes"), "Asks for large pages for memory that has not been touched yet.");
  module.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, uint64_t key) {
        const mopo::PhiloxBlock block =
            mopo::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key);
        return std::array<uint32_t, 4>{block.word[0], block.word[1], block.word[2], block.word[3]};
      },
      arg("counter"), arg("key"), "Ten rounds; for the known-answer test.");
  py::enum_<mopo::MathFunction>(module, "MathFunction")
      .value("exp", mopo::MathFunction::kExp)
      .value("log", mopo::MathFunction::kLog)
      .value("sin_turns", mopo::MathFunction::kSinTurns)
      .value("cos_turns", mopo::MathFunction::kCosTurns)
      .value("tanh", mopo::MathFunction::kTanh)
      .value("silu", mopo::MathFunction::kSilu)
      .value("rough_silu", mopo::MathFunction::kRoughSilu)
      .value("reciprocal", mopo::MathFunction::kReciprocal)
      .value("sqrt", mopo::MathFunction::kSqrt);
  module.def(
      "math",
      [](const std::string& isa, mopo::MathFunction function, uintptr_t x, uintptr_t y, int64_t count) {
        mopo::kernels(isa).math(function, pointer<float>(x), pointer<float>(y), count);
      },
      arg("isa"), arg("function"), arg("x"), arg("y"), arg("count"),
      "y = function(x), for the accuracy test.");
}
