// Runs one call of the CPU kernels for tests/arm/extension.py, in a process of another architecture: the call
// comes on standard input, and what it has written goes to standard output. All numbers are little-endian:
// whole ones have 64 bits, others are doubles, and arrays are their size in bytes and then their bytes.
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/calls.h"
#include "cpu/dispatch.h"

namespace {

class Call {
 public:
  Call() {
    char part[1 << 16];
    while (const size_t count = std::fread(part, 1, sizeof(part), stdin)) bytes_.append(part, count);
  }

  int64_t whole() { return take<int64_t>(); }
  bool flag() { return whole() != 0; }
  double number() { return take<double>(); }
  float single() { return static_cast<float>(number()); }
  std::string text() {
    const int64_t size = whole();
    return bytes_.substr(advance(size), static_cast<size_t>(size));
  }

  // An array; null for an empty one. What the call writes to an array of `writable` is part of the reply.
  template <class T>
  T* array() {
    return reinterpret_cast<T*>(next().data());
  }
  template <class T>
  T* writable() {
    Block& block = next();
    written_.push_back(&block);
    return reinterpret_cast<T*>(block.data());
  }
  template <class T>
  mopo::Array<T> rows(int64_t width) {
    return {array<std::remove_const_t<T>>(), width};
  }
  template <class T>
  mopo::Array<T> writable_rows(int64_t width) {
    return {writable<T>(), width};
  }

  void reply(const std::vector<double>& results) const {
    put(static_cast<int64_t>(results.size()));
    for (const double result : results) std::fwrite(&result, sizeof(result), 1, stdout);
    for (const Block* block : written_)
      if (block->size > 0) std::fwrite(block->data(), 1, block->size, stdout);
  }
  void put(int64_t whole) const { std::fwrite(&whole, sizeof(whole), 1, stdout); }

 private:
  // Aligned as torch's arrays.
  struct Block {
    std::unique_ptr<char[]> memory;
    size_t size;
    char* data() const {
      if (size == 0) return nullptr;
      const auto address = reinterpret_cast<uintptr_t>(memory.get());
      return memory.get() + (64 - address % 64);
    }
  };

  size_t advance(int64_t count) {
    const size_t from = at_;
    at_ += static_cast<size_t>(count);
    if (at_ > bytes_.size()) throw std::runtime_error("the call is shorter than it says");
    return from;
  }
  template <class T>
  T take() {
    T value;
    std::memcpy(&value, bytes_.data() + advance(sizeof(T)), sizeof(T));
    return value;
  }
  Block& next() {
    const size_t size = static_cast<size_t>(whole());
    blocks_.push_back(std::make_unique<Block>(Block{std::make_unique<char[]>(size + 128), size}));
    Block& block = *blocks_.back();
    if (size > 0) std::memcpy(block.data(), bytes_.data() + advance(static_cast<int64_t>(size)), size);
    return block;
  }

  std::string bytes_;
  size_t at_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Block*> written_;
};

struct OwnNetwork {
  std::vector<mopo::NetworkLayer> layers;
  mopo::Network network{};
};

OwnNetwork network(Call& call) {
  OwnNetwork own;
  own.network.networks = call.whole();
  own.network.activation = static_cast<mopo::Activation>(call.whole());
  own.network.depth = call.whole();
  int64_t in = call.whole();
  for (int64_t l = 0; l < own.network.depth; ++l) {
    const int64_t out = call.whole();
    const float* weight = call.array<float>();
    const float* bias = call.array<float>();
    const float* scale = call.array<float>();
    own.layers.push_back({weight, bias, in, out, scale, call.array<float>()});
    in = out;
  }
  own.network.layers = own.layers.data();
  return own;
}

mopo::Parameter parameter(Call& call) {
  float* value = call.writable<float>();
  float* exp_avg = call.writable<float>();
  float* exp_avg_sq = call.writable<float>();
  return {value, exp_avg, exp_avg_sq, call.writable<float>()};
}

std::vector<mopo::TrainedLayer> trained_layers(Call& call) {
  std::vector<mopo::TrainedLayer> layers(static_cast<size_t>(call.whole()));
  for (mopo::TrainedLayer& layer : layers) {
    layer.in = call.whole();
    layer.out = call.whole();
    layer.weight = parameter(call);
    layer.bias = parameter(call);
  }
  return layers;
}

std::vector<mopo::TrainedNorm> trained_norms(Call& call) {
  std::vector<mopo::TrainedNorm> norms(static_cast<size_t>(call.whole()));
  for (mopo::TrainedNorm& norm : norms) {
    norm.scale = parameter(call);
    norm.shift = parameter(call);
  }
  return norms;
}

std::vector<double> rollout(Call& call, const mopo::Kernels& kernels, mopo::Interrupt& interrupt) {
  mopo::RolloutArgs args{};
  const int64_t obs = args.obs_dim = call.whole(), act = args.act_dim = call.whole();
  const OwnNetwork dynamics = network(call);
  args.dynamics = dynamics.network;
  args.input_mean = call.array<float>();
  args.input_std = call.array<float>();
  args.max_logvar = call.array<float>();
  args.min_logvar = call.array<float>();
  args.carry = call.array<float>();
  args.log_std = call.flag();
  args.num_elites = call.whole();
  args.elites = call.array<int64_t>();
  args.num_penalty_members = call.whole();
  args.penalty_members = call.array<int64_t>();
  args.penalty = static_cast<mopo::Penalty>(call.whole());
  args.penalty_coef = call.single();
  args.penalties = call.flag();
  args.truncation.at = call.single();
  args.truncation.halts = call.flag();
  args.truncation.reward = call.single();
  args.keep_member = call.flag();
  args.low = call.array<float>();
  args.high = call.array<float>();
  const OwnNetwork policy = network(call);
  args.policy = policy.network;
  args.log_std_min = call.single();
  args.log_std_max = call.single();
  args.actions = call.array<float>();
  args.batch = call.whole();
  args.start = call.array<float>();
  args.rows = call.array<int64_t>();
  args.horizon = call.whole();
  args.first_step = static_cast<uint32_t>(call.whole());
  args.seed = static_cast<uint64_t>(call.whole());
  args.mean_actions = call.flag();
  args.deterministic = call.flag();
  args.precision = static_cast<mopo::Precision>(call.whole());
  args.keep_every_row = call.flag();
  args.out.observations = call.writable_rows<float>(obs);
  args.out.actions = call.writable_rows<float>(act);
  args.out.rewards = call.writable_rows<float>(1);
  args.out.next_observations = call.writable_rows<float>(obs);
  args.out.terminals = call.writable_rows<bool>(1);
  args.out.raw_rewards = call.writable_rows<float>(1);
  args.out.penalties = call.writable_rows<float>(1);
  args.out.members = call.writable_rows<int32_t>(1);
  args.out.rollout_index = call.writable_rows<int64_t>(1);
  args.out.step = call.writable_rows<int32_t>(1);
  args.capacity = call.whole();
  args.head = call.whole();
  args.mean = call.writable<float>();
  args.std = call.writable<float>();
  args.threads = static_cast<int>(call.whole());
  const mopo::Packed packed(args.dynamics, kernels.packings[static_cast<int>(args.precision)]);
  const mopo::RolloutCounts counts = mopo::rollout(args, packed, kernels, interrupt);
  return {static_cast<double>(counts.written), static_cast<double>(counts.non_finite),
          static_cast<double>(counts.truncated)};
}

std::vector<double> least_values(Call& call, const mopo::Kernels& kernels, mopo::Interrupt& interrupt) {
  mopo::ValuesArgs args{};
  args.obs_dim = call.whole();
  args.act_dim = call.whole();
  const OwnNetwork policy = network(call), critics = network(call);
  args.policy = policy.network;
  args.critics = critics.network;
  args.log_std_min = call.single();
  args.log_std_max = call.single();
  args.mean = call.array<float>();
  args.std = call.array<float>();
  args.samples = call.whole();
  args.members = call.whole();
  args.rows = call.whole();
  args.seed = static_cast<uint64_t>(call.whole());
  args.precision = static_cast<mopo::Precision>(call.whole());
  args.q = call.writable<float>();
  args.threads = static_cast<int>(call.whole());
  return {mopo::least_values(args, kernels, interrupt) ? 1.0 : 0.0};
}

mopo::SacSource source(Call& call, int64_t obs, int64_t act) {
  mopo::SacSource source{};
  source.size = call.whole();
  source.observations = call.rows<const float>(obs);
  source.actions = call.rows<const float>(act);
  source.rewards = call.rows<const float>(1);
  source.next_observations = call.rows<const float>(obs);
  source.terminals = call.rows<const bool>(1);
  return source;
}

std::vector<double> sac_updates(Call& call, const mopo::Kernels& kernels, mopo::Interrupt& interrupt) {
  mopo::SacArgs args{};
  args.obs_dim = call.whole();
  args.act_dim = call.whole();
  args.critics = call.whole();
  args.target_critics = call.whole();
  const std::vector<mopo::TrainedLayer> actor = trained_layers(call), critic = trained_layers(call);
  args.depth = static_cast<int64_t>(actor.size());
  args.actor = actor.data();
  args.critic = critic.data();
  args.log_alpha = parameter(call);
  args.actor_learning_rate = call.single();
  args.critic_learning_rate = call.single();
  args.alpha_learning_rate = call.single();
  args.discount = call.single();
  args.polyak = call.single();
  args.target_entropy = call.single();
  args.log_std_min = call.single();
  args.log_std_max = call.single();
  args.log_prob_epsilon = call.single();
  args.alpha_max = call.single();
  args.critic_loss_scale = call.single();
  args.target_min = call.single();
  args.entropy_backup = call.flag();
  args.mean_actor = call.flag();
  args.order = static_cast<mopo::SacOrder>(call.whole());
  args.adam_epsilon = call.number();
  args.precision = static_cast<mopo::Precision>(call.whole());
  args.real = source(call, args.obs_dim, args.act_dim);
  args.model = source(call, args.obs_dim, args.act_dim);
  args.real_rows = call.whole();
  args.model_rows = call.whole();
  args.in_order = call.flag();
  args.updates = call.whole();
  args.updates_before = call.whole();
  args.first_draw = call.whole();
  args.seed = static_cast<uint64_t>(call.whole());
  args.threads = static_cast<int>(call.whole());
  return mopo::sac_updates({args}, kernels, interrupt).at(0);
}

std::vector<double> fit_steps(Call& call, const mopo::Kernels& kernels, mopo::Interrupt& interrupt) {
  mopo::FitArgs args{};
  args.members = call.whole();
  args.dims = call.whole();
  const std::vector<mopo::TrainedLayer> layers = trained_layers(call);
  args.depth = static_cast<int64_t>(layers.size());
  args.layers = layers.data();
  const std::vector<mopo::TrainedNorm> norms = trained_norms(call);
  args.norms = norms.empty() ? nullptr : norms.data();
  args.activation = static_cast<mopo::Activation>(call.whole());
  args.max_logvar = parameter(call);
  args.min_logvar = parameter(call);
  args.stride = call.whole();
  const int64_t width = call.whole();
  args.inputs = call.array<float>();
  args.targets = args.inputs + width;
  args.count = args.rows_stride = call.whole();
  args.rows = call.array<int32_t>();
  args.batch = call.whole();
  args.learning_rate = call.single();
  args.logvar_bound_weight = call.single();
  args.weight_decay = call.array<float>();
  args.steps_before = call.whole();
  args.precision = static_cast<mopo::Precision>(call.whole());
  args.threads = static_cast<int>(call.whole());
  return {mopo::fit_steps({args}, kernels, interrupt).at(0)};
}

std::vector<double> math(Call& call, const mopo::Kernels& kernels) {
  const auto function = static_cast<mopo::MathFunction>(call.whole());
  const int64_t count = call.whole();
  const float* x = call.array<float>();
  kernels.math(function, x, call.writable<float>(), count);
  return {};
}

}  // namespace

int main() {
  try {
    Call call;
    const std::string name = call.text();
    if (name == "isas") {
      std::string names;
      for (const std::string& isa : mopo::supported_isas()) names += isa + "\n";
      std::fputs(names.c_str(), stdout);
      return 0;
    }
    const mopo::Kernels& kernels = mopo::kernels(call.text());
    mopo::Interrupt interrupt([] { return false; });
    std::vector<double> results;
    if (name == "rollout")
      results = rollout(call, kernels, interrupt);
    else if (name == "least_values")
      results = least_values(call, kernels, interrupt);
    else if (name == "sac_updates")
      results = sac_updates(call, kernels, interrupt);
    else if (name == "fit_steps")
      results = fit_steps(call, kernels, interrupt);
    else if (name == "math")
      results = math(call, kernels);
    else
      throw std::runtime_error("there is no call " + name);
    call.reply(results);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
