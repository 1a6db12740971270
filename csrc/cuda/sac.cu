// SAC updates; csrc/cpu/sac.inl says the same for a processor.
#include "cuda/random.cuh"
#include "cuda/train.cuh"

namespace mopo::cuda {

// Numbers of a row that are summed over the batch.
enum Sum { kLogProb, kSquares, kValues, kLeastValue, kSums };

// One run. A matrix of several sections has the batch in each.
struct Sac {
  SacArgs args;                 // but for the layers, which are
  const Layer *actor, *critic;  // [depth] and [critics][depth]
  int batch, rows;              // rows of a section: the batch, rounded up to whole tiles
  Matrix observations;          // 2 sections: observations; next observations
  Matrix pairs;            // 3 sections: these with actions, the data's; the policy's; next observations'
  Matrix actions;          // the policy's
  Matrix spread, log_std;  // its std * noise; log std before the clip
  Matrix action_grad;      // of - Q / batch by the policy's actions
  double* sums;            // [kSums][batch]
  const AdamStep* steps;   // [updates][3]: of the critics, the actor and the temperature
  double* metrics;
  uint32_t* counter;
};

__device__ __forceinline__ float temperature(const SacArgs& args) {
  const float alpha = expf(*args.log_alpha.value);
  return alpha > args.alpha_max ? args.alpha_max : alpha;
}

__device__ __forceinline__ float softplus(float x) { return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x))); }

// kTile rows of a batch, from `first` on. What they take through a network are one or two sections of them.
template <int kTile>
struct SacTile {
  static constexpr int kStride = 2 * kTile;
  const Sac& sac;
  const SacArgs& args;
  const float alpha;
  const uint32_t step;
  const int first;

  // In shared memory, of each row.
  __device__ __forceinline__ float* values() const { return activations(); }
  __device__ __forceinline__ int64_t* drawn() const { return reinterpret_cast<int64_t*>(values()); }
  __device__ __forceinline__ float* rewards() const { return values() + 2 * kTile; }
  __device__ __forceinline__ float* continues() const { return values() + 3 * kTile; }
  __device__ __forceinline__ float* targets() const { return values() + 4 * kTile; }
  __device__ __forceinline__ float* log_probs() const {
    return values() + 5 * kTile;
  }  // of observations' sections
  __device__ __forceinline__ float* q_grads() const { return values() + 7 * kTile; }  // of pairs' first two
  __device__ __forceinline__ float* q(int critic) const {
    return values() + (9 + 3 * critic) * kTile;
  }  // of all
  // What goes through a layer, [width][kStride].
  __device__ __forceinline__ float* x() const { return q(static_cast<int>(args.critics)); }
  __device__ __forceinline__ float& x(int column, int row) const { return x()[column * kStride + row]; }

  __device__ __forceinline__ int hidden() const { return static_cast<int>(args.depth) - 1; }
  __device__ __forceinline__ int obs_dim() const { return static_cast<int>(args.obs_dim); }
  __device__ __forceinline__ int act_dim() const { return static_cast<int>(args.act_dim); }
  __device__ __forceinline__ const Layer* critic(int j) const { return sac.critic + j * args.depth; }

  // The row of a matrix that row v of what goes through a layer is, which begins with `section`.
  __device__ __forceinline__ int row(int section, int v) const {
    return (section + v / kTile) * sac.rows + first + v % kTile;
  }
  // Its row of the batch; the last tile's rows beyond the batch are its last, and leave no trace.
  __device__ __forceinline__ int batch_row(int v) const { return min(first + v % kTile, sac.batch - 1); }
  __device__ __forceinline__ const SacSource& source(int v) const {
    return batch_row(v) < args.real_rows ? args.real : args.model;
  }

  __device__ __forceinline__ void gather() const {
    const int obs_dim = this->obs_dim(), act_dim = this->act_dim();
    if (threadIdx.x < kTile) {
      const int v = threadIdx.x;
      const uint32_t word = random_block(batch_row(v), step, kBatchStream, 0, args.seed).word[0];
      const int64_t from = choose(word, static_cast<uint32_t>(source(v).size));
      drawn()[v] = from;
      rewards()[v] = *source(v).rewards.at(from);
      continues()[v] = *source(v).terminals.at(from) ? 0.0f : args.discount;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * obs_dim; i += kThreads) {
      const int v = i / obs_dim, d = i % obs_dim;
      const float observation = source(v).observations.at(drawn()[v])[d];
      const float next = source(v).next_observations.at(drawn()[v])[d];
      sac.observations.at(row(0, v))[d] = observation;
      sac.observations.at(row(1, v))[d] = next;
      sac.pairs.at(row(0, v))[d] = observation;
      sac.pairs.at(row(1, v))[d] = observation;
      sac.pairs.at(row(2, v))[d] = next;
    }
    for (int i = threadIdx.x; i < kTile * act_dim; i += kThreads) {
      const int v = i / act_dim, d = i % act_dim;
      sac.pairs.at(row(0, v))[obs_dim + d] = source(v).actions.at(drawn()[v])[d];
    }
  }

  // Sections of `input` through a network's layers but the last, into x; those before `kept` are kept.
  template <int kRows>
  __device__ __forceinline__ void hidden_layers(const Matrix& input, const Layer* layers,
                                                Matrix Layer::* weights, int section, int kept) const {
    const int width = layers[0].in;
    __syncthreads();
    for (int i = threadIdx.x; i < kRows / 4 * width; i += kThreads) {
      const int v = i / width * 4, d = i % width;
      four(&x(d, v)) = load_column(input, row(section, v), d);
    }
    for (int l = 0; l < hidden(); ++l) {
      const Layer& layer = layers[l];
      const Matrix& matrix = layer.*weights;
      const float* bias = matrix.at(layer.in);
      multiply<kRows, kStride>(
          x(), matrix.data, matrix.stride, layer.in, layer.out, [&](int n, int v, float4 sum) {
            const float4 y = each(sum, [b = bias[n]](float z) { return z + b < 0.0f ? 0.0f : z + b; });
            four(&x(n, v)) = y;
            if (section + v / kTile < kept) store_column(layers[l + 1].inputs, row(section, v), n, y);
          });
    }
  }

  // The last layer, into `to`, `stride` from one output to the next.
  template <int kRows>
  __device__ __forceinline__ void last_layer(const Layer* layers, Matrix Layer::* weights, float* to,
                                             int stride) const {
    const Layer& layer = layers[hidden()];
    const Matrix& matrix = layer.*weights;
    const float* bias = matrix.at(layer.in);
    multiply<kRows, kStride>(
        x(), matrix.data, matrix.stride, layer.in, layer.out, [&](int n, int v, float4 sum) {
          four(to + n * stride + v) = each(sum, [b = bias[n]](float z) { return z + b; });
        });
    __syncthreads();
  }

  // Actions and their log-probabilities, at observations and at next observations.
  __device__ __forceinline__ void act() const {
    const int act_dim = this->act_dim();
    hidden_layers<kStride>(sac.observations, sac.actor, &Layer::value, 0, 1);
    last_layer<kStride>(sac.actor, &Layer::value, x(), kStride);
    float* terms = partials();
    for (int i = threadIdx.x; i < act_dim * kStride; i += kThreads) {
      const int d = i / kStride, v = i % kStride;
      const Stream stream = v < kTile ? kActionStream : kNextActionStream;
      const float noise = normal(random_block(batch_row(v), step, stream, d / 4, args.seed), d % 4);
      const float mean = x(d, v), raw_log_std = x(act_dim + d, v);
      float log_std = raw_log_std < args.log_std_min ? args.log_std_min : raw_log_std;
      log_std = log_std > args.log_std_max ? args.log_std_max : log_std;
      const float spread = expf(log_std) * noise, raw = mean + spread, action = tanhf(raw);
      // log(1 - tanh(x)^2) without cancellation.
      const float squash = 2.0f * (0.69314718056f - raw - softplus(-2.0f * raw));
      terms[i] = -0.5f * noise * noise - log_std - 0.91893853320f - squash;
      sac.pairs.at(row(1, v))[obs_dim() + d] = action;
      if (v >= kTile) continue;
      sac.actions.at(row(0, v))[d] = action;
      sac.spread.at(row(0, v))[d] = spread;
      sac.log_std.at(row(0, v))[d] = raw_log_std;
    }
    __syncthreads();
    if (threadIdx.x < kStride) {
      float log_prob = 0.0f;
      for (int d = 0; d < act_dim; ++d) log_prob += terms[d * kStride + threadIdx.x];
      log_probs()[threadIdx.x] = log_prob;
      if (threadIdx.x < kTile) add(kLogProb, log_prob);
    }
  }

  // This thread's row's part in a sum.
  __device__ __forceinline__ void add(Sum sum, double x) const {
    const int row = first + threadIdx.x;
    if (row < sac.batch) sac.sums[sum * sac.batch + row] = x;
  }

  __device__ __forceinline__ void evaluate_targets() const {
    for (int j = 0; j < args.critics; ++j) {
      hidden_layers<kTile>(sac.pairs, critic(j), &Layer::target, 2, 0);
      last_layer<kTile>(critic(j), &Layer::target, q(j) + 2 * kTile, 0);
    }
    if (threadIdx.x >= kTile) return;
    const int v = threadIdx.x;
    float least = q(0)[2 * kTile + v];
    for (int j = 1; j < args.critics; ++j) {
      const float other = q(j)[2 * kTile + v];
      if (other < least || other != other) least = other;
    }
    const float value = least - alpha * log_probs()[kTile + v];
    targets()[v] = rewards()[v] + (continues()[v] != 0.0f ? continues()[v] * value : 0.0f);
  }

  // The critics forwards and backwards, kRows of the sections from `section` on: 0 for their own loss, 1 for
  // the policy's.
  template <int kRows>
  __device__ __forceinline__ void critics(int section) const {
    for (int j = 0; j < args.critics; ++j) {
      hidden_layers<kRows>(sac.pairs, critic(j), &Layer::value, section, 2);
      last_layer<kRows>(critic(j), &Layer::value, q(j) + section * kTile, 0);
    }
    int least = 0;
    if (threadIdx.x < kTile) {
      const int v = threadIdx.x;
      double squares = 0.0, sum = 0.0;
      for (int j = 0; j < args.critics; ++j) {
        const double error = static_cast<double>(q(j)[v]) - targets()[v];
        squares += error * error;
        sum += q(j)[v];
        if (q(j)[kTile + v] < q(least)[kTile + v]) least = j;
      }
      if (section == 0) {
        add(kSquares, squares);
        add(kValues, sum);
      }
      if (section + kRows / kTile > 1) {
        double value = q(0)[kTile + v];
        for (int j = 1; j < args.critics; ++j) value = q(j)[kTile + v] < value ? q(j)[kTile + v] : value;
        add(kLeastValue, value);
      }
    }
    for (int j = 0; j < args.critics; ++j) {
      __syncthreads();
      if (threadIdx.x < kTile) {
        const int v = threadIdx.x;
        const float share = 1.0f / static_cast<float>(sac.batch),
                    scale = 2.0f * args.critic_loss_scale * share;
        if (section == 0) q_grads()[v] = scale * (q(j)[v] - targets()[v]);
        if (section + kRows / kTile > 1) q_grads()[(1 - section) * kTile + v] = least == j ? -share : 0.0f;
      }
      __syncthreads();
      critic_backward<kRows>(j, section);
    }
  }

  template <int kRows>
  __device__ __forceinline__ void critic_backward(int j, int section) const {
    const Layer *layers = critic(j), &head = layers[hidden()];
    for (int i = threadIdx.x; i < kRows / 4 * head.in; i += kThreads) {
      const int v = i / head.in * 4, k = i % head.in;
      const float4 outputs = load_column(head.inputs, row(section, v), k);
      const float4 grads =
          each(outputs, four(q_grads() + v),
               [w = *head.value.at(k)](float output, float grad) { return output > 0.0f ? grad * w : 0.0f; });
      four(&x(k, v)) = grads;
      if (section + v / kTile == 0) store_column(layers[hidden() - 1].grads, row(0, v), k, grads);
    }
    if (section == 0 && threadIdx.x < kTile) *head.grads.at(first + threadIdx.x) = q_grads()[threadIdx.x];
    for (int l = hidden() - 1; l > 0; --l) backward<kRows>(layers, l, section);
    if (section + kRows / kTile == 1) return;
    // Whole groups of four columns, from the actions on.
    const Layer& layer = layers[0];
    const int begin = obs_dim() / 4 * 4;
    multiply<kTile, kStride>(x() + kRows - kTile, layer.transposed.data + begin, layer.transposed.stride,
                             layer.out, layer.in - begin, [&](int n, int v, float4 sum) {
                               const int d = begin + n - obs_dim();
                               if (d < 0) return;
                               if (j > 0)
                                 sum = each(sum, load_column(sac.action_grad, row(0, v), d),
                                            [](float a, float b) { return a + b; });
                               store_column(sac.action_grad, row(0, v), d, sum);
                             });
  }

  // From the gradients of layer l's outputs to those before the activation below it.
  template <int kRows>
  __device__ __forceinline__ void backward(const Layer* layers, int l, int section) const {
    const Layer &layer = layers[l], &below = layers[l - 1];
    multiply<kRows, kStride>(x(), layer.transposed.data, layer.transposed.stride, layer.out, layer.in,
                             [&](int k, int v, float4 sum) {
                               const float4 grads =
                                   each(sum, load_column(layer.inputs, row(section, v), k),
                                        [](float grad, float output) { return output > 0.0f ? grad : 0.0f; });
                               four(&x(k, v)) = grads;
                               if (section + v / kTile == 0) store_column(below.grads, row(0, v), k, grads);
                             });
  }

  // From the gradients of the actions through Q to those of the actor's layers.
  __device__ __forceinline__ void actor() const {
    const float share = 1.0f / static_cast<float>(sac.batch);
    const int act_dim = this->act_dim();
    const Layer& head = sac.actor[hidden()];
    __syncthreads();
    for (int i = threadIdx.x; i < act_dim * kTile; i += kThreads) {
      const int d = i / kTile, v = i % kTile;
      const float action = sac.actions.at(row(0, v))[d], log_std = sac.log_std.at(row(0, v))[d];
      const float q_grad = sac.action_grad.at(row(0, v))[d];
      const float raw_grad = alpha * share * 2.0f * action + q_grad * (1.0f - action * action);
      const bool free = log_std >= args.log_std_min && log_std <= args.log_std_max;
      const float log_std_grad = free ? raw_grad * sac.spread.at(row(0, v))[d] - alpha * share : 0.0f;
      head.grads.at(row(0, v))[d] = x(d, v) = raw_grad;
      head.grads.at(row(0, v))[act_dim + d] = x(act_dim + d, v) = log_std_grad;
    }
    for (int l = hidden(); l > 0; --l) backward<kTile>(sac.actor, l, 0);
  }
};

// The temperature's step, and the update's metrics, which are of the state before it.
__device__ __forceinline__ void train_temperature(const Sac& sac, const AdamStep& step) {
  const SacArgs& args = sac.args;
  const double* sums = add_up(sac.sums, kSums, sac.batch);
  if (threadIdx.x > 0) return;
  const double count = sac.batch, entropy = -sums[kLogProb] / count, alpha = temperature(args);
  const double gradient = entropy - args.target_entropy;
  const double values[kSacMetrics] = {args.critic_loss_scale * sums[kSquares] / count,
                                      -alpha * entropy - sums[kLeastValue] / count,
                                      *args.log_alpha.value * gradient,
                                      sums[kValues] / (count * static_cast<double>(args.critics)),
                                      alpha,
                                      entropy};
  for (int i = 0; i < kSacMetrics; ++i) sac.metrics[i] += values[i];
  adam(step, args.log_alpha, 0, static_cast<float>(gradient));
}

template <int kTile>
__global__ void __launch_bounds__(kThreads, 1) sac_kernel(const __grid_constant__ Launch<Sac> launch) {
  const Sac& sac = launch.runs[blockIdx.x / launch.blocks];
  const SacArgs& args = sac.args;
  const int depth = static_cast<int>(args.depth), critic_layers = static_cast<int>(args.critics) * depth;
  Group group{launch.blocks, static_cast<int>(blockIdx.x) % launch.blocks, sac.counter};
  for (int l = 0; l < critic_layers; ++l) take_up(group, sac.critic[l], sac.rows);
  for (int l = 0; l < depth; ++l) take_up(group, sac.actor[l], sac.rows);
  for (int update = 0; update < args.updates; ++update) {
    const AdamStep* steps = sac.steps + 3 * update;
    const uint32_t number = static_cast<uint32_t>(args.first_draw + update);
    const auto each_tile = [&](auto work) {
      group.wait();
      const float alpha = temperature(args);
      for (int first = group.block * kTile; first < sac.batch; first += group.blocks * kTile)
        work(SacTile<kTile>{sac, args, alpha, number, first});
      group.wait();
    };
    int next = group.block;
    const auto train = [&](const Layer* layers, int count, const AdamStep& step) {
      for (int l = 0; l < count; ++l) train_layer(group, layers[l], step, sac.batch, next);
    };
    const auto forward = [](const SacTile<kTile>& tile) {
      tile.gather();
      tile.act();
      tile.evaluate_targets();
    };
    if (args.simultaneous) {
      each_tile([&](const SacTile<kTile>& tile) {
        forward(tile);
        tile.template critics<2 * kTile>(0);
        tile.actor();
      });
      train(sac.critic, critic_layers, steps[0]);
    } else {
      each_tile([&](const SacTile<kTile>& tile) {
        forward(tile);
        tile.template critics<kTile>(0);
      });
      train(sac.critic, critic_layers, steps[0]);
      each_tile([&](const SacTile<kTile>& tile) {
        tile.template critics<kTile>(1);
        tile.actor();
      });
    }
    train(sac.actor, depth, steps[1]);
    if (group.block == group.blocks - 1) train_temperature(sac, steps[2]);
  }
}

namespace {

Sac lay_out(Memory& memory, const SacArgs& args, double* metrics) {
  Sac sac{};
  sac.args = args;
  sac.batch = static_cast<int>(args.real_rows + args.model_rows);
  sac.rows = round_up(sac.batch, 8);
  const int rows = sac.rows;
  sac.observations = memory.take_matrix(2 * rows, args.obs_dim + 1);
  sac.pairs = memory.take_matrix(3 * rows, args.obs_dim + args.act_dim + 1);
  for (Matrix* each : {&sac.actions, &sac.spread, &sac.log_std, &sac.action_grad})
    *each = memory.take_matrix(rows, args.act_dim);
  const auto take = [&](std::vector<Layer>& layers, const TrainedLayer* from, int64_t network, Matrix inputs,
                        int sections, bool to_the_inputs) {
    for (int64_t l = 0; l < args.depth; ++l) {
      if (l > 0) inputs = memory.take_matrix(sections * rows, from[l].in + 1);
      layers.push_back(memory.take_layer(from[l], network, inputs, rows, l > 0 || to_the_inputs));
    }
  };
  std::vector<Layer> actor, critic;
  take(actor, args.actor, 0, sac.observations, 1, false);
  for (int64_t j = 0; j < args.critics; ++j) take(critic, args.critic, j, sac.pairs, 2, true);
  sac.actor = memory.put(actor);
  sac.critic = memory.put(critic);
  sac.sums = memory.take<double>(kSums * sac.batch);
  std::vector<AdamStep> steps;
  for (int64_t number = args.updates_before + 1; number <= args.updates_before + args.updates; ++number) {
    steps.push_back(adam_step(args.critic_learning_rate, number, 0.0f, args.polyak));
    steps.push_back(adam_step(args.actor_learning_rate, number, 0.0f, 0.0f));
    steps.push_back(adam_step(args.alpha_learning_rate, number, 0.0f, 0.0f));
  }
  sac.steps = memory.put(steps);
  sac.metrics = metrics;
  sac.counter = memory.put(std::vector<uint32_t>{0});
  return sac;
}

}  // namespace

cudaError_t sac_updates(const std::vector<SacArgs>& runs, double* metrics, const Allocate& allocate,
                        cudaStream_t stream) {
  const SacArgs& first = runs.front();
  const int widest_layer = std::max(widest(first.actor, first.depth), widest(first.critic, first.depth));
  const int floats = 9 + 3 * static_cast<int>(first.critics) + 2 * widest_layer;  // of a row
  return each_launch(runs, [&](const SacArgs* some, int count, int blocks, const Device& device) {
    const bool large =
        first.real_rows + first.model_rows > 4 * blocks && shared_bytes(8 * floats) <= device.shared_bytes;
    return launch_with_memory(
        allocate, stream,
        [&](Memory& memory) {
          std::vector<Sac> all;
          for (const SacArgs* args = some; args < some + count; ++args)
            all.push_back(lay_out(memory, *args, metrics + (args - runs.data()) * kSacMetrics));
          return Launch<Sac>{memory.put(all), blocks};
        },
        [&](const Launch<Sac>& launch) {
          return ptx::launch_together(large ? sac_kernel<8> : sac_kernel<4>, count * blocks, kThreads,
                                      shared_bytes((large ? 8 : 4) * floats), stream, launch);
        });
  });
}

}  // namespace mopo::cuda
