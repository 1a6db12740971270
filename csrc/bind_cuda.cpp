// The Python module _cuda: device addresses and sizes in. mopo_fast/backends/checked.py checks them first;
// only CUDA's own errors are looked at here.
#include <stdexcept>

#include "bind.h"
#include "cuda/rollout_launch.h"
#include "cuda/training_launch.h"

namespace {

// The arrays of mopo::cuda::DeviceRecord in its order, which is also that of
// mopo_fast/backends/gpu/padded.py.
using RecordAddresses = std::array<uintptr_t, 9>;

mopo::cuda::DeviceRecord record(const RecordAddresses& a) {
  return {pointer<float>(a[0]),   pointer<float>(a[1]),   pointer<float>(a[2]),
          pointer<bool>(a[3]),    pointer<float>(a[4]),   pointer<float>(a[5]),
          pointer<int32_t>(a[6]), pointer<int32_t>(a[7]), pointer<int32_t>(a[8])};
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void rollout(bool bfloat16, int width, int slots, uintptr_t weights, uintptr_t chunk_bytes, int chunks,
             int obs_dim, int act_dim, int members, int hidden_layers, int activation, uintptr_t input_mean,
             uintptr_t input_std, uintptr_t exp_minus_max, uintptr_t exp_min, uintptr_t carry, bool log_std,
             uintptr_t elites, int num_elites, uintptr_t penalty_members, int num_penalty_members,
             const std::string& penalty, float penalty_coef, float truncate_at, bool halts, float halt_reward,
             bool keep_member, uintptr_t low, uintptr_t high, int policy_hidden_layers, int policy_activation,
             float log_std_min, float log_std_max, int batch, uintptr_t start, uintptr_t rows, int horizon,
             uint32_t first_step, uint64_t seed, bool mean_actions, bool deterministic,
             const RecordAddresses& to, uintptr_t mean, uintptr_t std, uintptr_t scratch, int blocks,
             uintptr_t cuda_stream) {
  mopo::cuda::RolloutLaunch args{};
  args.weights = pointer<unsigned char>(weights);
  args.chunk_bytes = pointer<int32_t>(chunk_bytes);
  args.chunks = chunks;
  args.obs_dim = obs_dim;
  args.act_dim = act_dim;
  args.members = members;
  args.hidden_layers = hidden_layers;
  args.activation = static_cast<mopo::Activation>(activation);
  args.input_mean = pointer<float>(input_mean);
  args.input_std = pointer<float>(input_std);
  args.exp_minus_max = pointer<float>(exp_minus_max);
  args.exp_min = pointer<float>(exp_min);
  args.carry = pointer<float>(carry);
  args.log_std = log_std;
  args.elites = pointer<int64_t>(elites);
  args.num_elites = num_elites;
  args.penalty_members = pointer<int64_t>(penalty_members);
  args.num_penalty_members = num_penalty_members;
  args.penalty = penalty_called(penalty);
  args.penalty_coef = penalty_coef;
  args.truncation = {truncate_at, halts, halt_reward};
  args.keep_member = keep_member;
  args.low = pointer<float>(low);
  args.high = pointer<float>(high);
  args.policy_hidden_layers = policy_hidden_layers;
  args.policy_activation = static_cast<mopo::Activation>(policy_activation);
  args.log_std_min = log_std_min;
  args.log_std_max = log_std_max;
  args.batch = batch;
  args.start = pointer<float>(start);
  args.rows = pointer<int64_t>(rows);
  args.horizon = horizon;
  args.first_step = first_step;
  args.seed = seed;
  args.mean_actions = mean_actions;
  args.deterministic = deterministic;
  args.record = record(to);
  args.mean = pointer<float>(mean);
  args.std = pointer<float>(std);
  args.scratch = pointer<float>(scratch);
  args.blocks = blocks;
  const py::gil_scoped_release release;
  const auto launch = bfloat16 ? mopo::cuda::rollout_bfloat16 : mopo::cuda::rollout_float16;
  check(launch(args, width, slots, reinterpret_cast<cudaStream_t>(cuda_stream)), "the rollout's kernel");
}

void compact(int obs_dim, int act_dim, int batch, int horizon, uintptr_t start, uintptr_t rows,
             const RecordAddresses& from, uintptr_t offsets, const std::vector<ArrayTuple>& out,
             int64_t capacity, int64_t head, uintptr_t cuda_stream) {
  mopo::cuda::CompactLaunch args{};
  args.obs_dim = obs_dim;
  args.act_dim = act_dim;
  args.batch = batch;
  args.horizon = horizon;
  args.start = pointer<float>(start);
  args.rows = pointer<int64_t>(rows);
  args.record = record(from);
  args.offsets = pointer<int64_t>(offsets);
  args.out = {array<float>(out[0]),   array<float>(out[1]),  array<float>(out[2]), array<float>(out[3]),
              array<bool>(out[4]),    array<float>(out[5]),  array<float>(out[6]), array<int32_t>(out[7]),
              array<int64_t>(out[8]), array<int32_t>(out[9])};
  args.capacity = capacity;
  args.head = head;
  const py::gil_scoped_release release;
  check(mopo::cuda::compact(args, reinterpret_cast<cudaStream_t>(cuda_stream)), "the compaction's kernel");
}

// (driver, runtime) versions of CUDA as 1000 major + 10 minor. The driver's is the newest version that it
// serves, 0 without a driver; the runtime is linked in.
std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "the driver's version");
  check(cudaRuntimeGetVersion(&runtime), "the runtime's version");
  return {driver, runtime};
}

// Trains runs on a CUDA stream. allocate(bytes) returns the address of device memory.
template <class Args, class Call>
void train(cudaError_t (*start)(const std::vector<Args>&, double*, const mopo::cuda::Allocate&, cudaStream_t),
           const std::vector<Call*>& calls, uintptr_t sums, const py::function& allocate,
           uintptr_t cuda_stream) {
  std::vector<Args> runs;
  for (const Call* call : calls) runs.push_back(call->args);
  const auto take = [&](size_t bytes) {
    const py::gil_scoped_acquire acquire;
    return pointer<void>(allocate(bytes).cast<uintptr_t>());
  };
  const py::gil_scoped_release release;
  check(start(runs, pointer<double>(sums), take, reinterpret_cast<cudaStream_t>(cuda_stream)),
        "the training's kernel");
}

void sac_updates(const std::vector<SacCall*>& calls, uintptr_t metrics, const py::function& allocate,
                 uintptr_t cuda_stream) {
  train(mopo::cuda::sac_updates, calls, metrics, allocate, cuda_stream);
}

void fit_steps(const std::vector<FitCall*>& calls, uintptr_t losses, const py::function& allocate,
               uintptr_t cuda_stream) {
  train(mopo::cuda::fit_steps, calls, losses, allocate, cuda_stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using py::arg;
#ifdef MOPO_FAST_WATCHDOG
  module.attr("watchdog") = true;
#else
  module.attr("watchdog") = false;
#endif
  module.def("versions", versions, "Return the CUDA versions of the driver and of the runtime.");
  module.def("penalties", penalty_names, "Names of the penalties that the rollout has.");
  module.def("rollout", rollout, py::kw_only(), arg("bfloat16"), arg("width"), arg("slots"), arg("weights"),
             arg("chunk_bytes"), arg("chunks"), arg("obs_dim"), arg("act_dim"), arg("members"),
             arg("hidden_layers"), arg("activation"), arg("input_mean"), arg("input_std"),
             arg("exp_minus_max"), arg("exp_min"), arg("carry"), arg("log_std"), arg("elites"),
             arg("num_elites"), arg("penalty_members"), arg("num_penalty_members"), arg("penalty"),
             arg("penalty_coef"), arg("truncate_at"), arg("halts"), arg("halt_reward"), arg("keep_member"),
             arg("low"), arg("high"), arg("policy_hidden_layers"), arg("policy_activation"),
             arg("log_std_min"), arg("log_std_max"), arg("batch"), arg("start"), arg("rows"), arg("horizon"),
             arg("first_step"), arg("seed"), arg("mean_actions"), arg("deterministic"), arg("record"),
             arg("mean"), arg("std"), arg("scratch"), arg("blocks"), arg("stream"),
             "Start the rollout of csrc/cuda/rollout_launch.h on a CUDA stream.");
  module.def("compact", compact, py::kw_only(), arg("obs_dim"), arg("act_dim"), arg("batch"), arg("horizon"),
             arg("start"), arg("rows"), arg("record"), arg("offsets"), arg("out"), arg("capacity"),
             arg("head"), arg("stream"), "Start the copy of a record's rows into the ring.");
  bind_calls(module);
  module.def("sac_updates", sac_updates, arg("calls"), arg("metrics"), arg("allocate"), arg("stream"),
             "Make runs' updates on a CUDA stream and wait for them; add to metrics [runs, 6], float64.");
  module.def("fit_steps", fit_steps, arg("calls"), arg("losses"), arg("allocate"), arg("stream"),
             "Make runs' fit steps on a CUDA stream and wait for them; add to losses [runs], float64.");
}
