// SAC updates in CUDA, the counterpart of csrc/cpu/sac.inl.
#include "cuda/random.cuh"
#include "cuda/train.cuh"

namespace mopo::cuda {

// Numbers of each row that are summed over the batch, for the metrics and the temperature. Behind them come
// each critic's squared errors. The first kPolicySums of them are of the policy.
enum RowSum { kLogProb, kActorValue, kPolicySums, kValues = kPolicySums, kSquares };

// One run. A matrix of several sections has `rows` rows in each.
struct Sac {
  SacArgs args;            // its layers are the host's; the device has
  const Layer* layers;     // [critics + 1][depth], the actor's last
  int batch, rows;         // rows of a section: the batch, rounded up to whole tiles
  Matrix observations;     // 2 sections: observations; next observations
  Matrix pairs;            // the critics' inputs, 3 sections: observations with the data's actions; with the
                           // policy's; next observations with the policy's
  Matrix actions;          // the policy's
  Matrix spread, log_std;  // its std * noise; log std before the clip
  Matrix slope;            // of tanh at its action; not used without a log_prob_epsilon
  Matrix action_grad;      // of -Q / batch by the policy's actions
  double* sums;            // [kSquares + critics][batch]
  const SacSteps* steps;   // [updates]
  double* metrics;
  uint32_t* counter;
};

MOPO_DEVICE float temperature(const SacArgs& args) {
  const float alpha = expf(*args.log_alpha.value);
  return alpha > args.alpha_max ? args.alpha_max : alpha;
}

// kTile rows of a batch, from `first` on. One section of them passes through a network, or two at once.
// Through the critics pass the first two sections of pairs: at once if kBoth, else one in each of two passes.
template <int kTile, bool kBoth>
struct SacTile {
  static constexpr int kStride = 2 * kTile, kCriticRows = kBoth ? kStride : kTile;
  const Sac& sac;
  const SacArgs& args;
  const float alpha;
  const uint32_t step;
  const int first;

  // Arrays in shared memory, a number for each row of the tile: drawn() of 8 bytes; log_probs() for both
  // sections of observations, q_grads() for the first two of pairs, q() for all three.
  MOPO_DEVICE float* values() const { return activations(); }
  MOPO_DEVICE int64_t* drawn() const { return reinterpret_cast<int64_t*>(values()); }
  MOPO_DEVICE float* rewards() const { return values() + 2 * kTile; }
  MOPO_DEVICE float* discounts() const { return values() + 3 * kTile; }
  MOPO_DEVICE float* targets() const { return values() + 4 * kTile; }
  MOPO_DEVICE float* log_probs() const { return values() + 5 * kTile; }
  MOPO_DEVICE float* q_grads() const { return values() + 7 * kTile; }
  MOPO_DEVICE float* q(int critic) const { return values() + (9 + 3 * critic) * kTile; }
  // The inputs or gradients that pass through a layer, [width][kStride].
  MOPO_DEVICE float* x() const { return q(static_cast<int>(args.critics)); }
  MOPO_DEVICE float& x(int column, int row) const { return x()[column * kStride + row]; }

  MOPO_DEVICE int hidden_count() const { return static_cast<int>(args.depth) - 1; }
  MOPO_DEVICE int obs_dim() const { return static_cast<int>(args.obs_dim); }
  MOPO_DEVICE int act_dim() const { return static_cast<int>(args.act_dim); }
  MOPO_DEVICE const Layer* critic(int j) const { return sac.layers + j * args.depth; }
  MOPO_DEVICE const Layer* actor() const { return critic(static_cast<int>(args.critics)); }
  // True if section 0, or section 1, is among those that the critics take at once from `section` on.
  MOPO_DEVICE static bool has_data(int section) { return section == 0; }
  MOPO_DEVICE static bool has_policy(int section) { return kBoth || section == 1; }

  // The row of a matrix for row v of x(), whose first section is `section`.
  MOPO_DEVICE int row(int section, int v) const {
    return (section + v / kTile) * sac.rows + first + v % kTile;
  }
  // Its row of the batch. Rows of the last tile beyond the batch repeat the batch's last row, and enter no
  // sum.
  MOPO_DEVICE int batch_row(int v) const { return min(first + v % kTile, sac.batch - 1); }
  MOPO_DEVICE const SacSource& source(int v) const {
    return batch_row(v) < args.real_rows ? args.real : args.model;
  }

  MOPO_DEVICE void draw() const {
    if (threadIdx.x < kTile) {
      const int v = threadIdx.x;
      const int64_t from = sac_row(args, batch_row(v), step);
      drawn()[v] = from;
      rewards()[v] = *source(v).rewards.at(from);
      discounts()[v] = *source(v).terminals.at(from) ? 0.0f : args.discount;
    }
    __syncthreads();
  }

  // Puts the rows that are drawn into the matrices.
  MOPO_DEVICE void gather() const {
    const int obs_dim = this->obs_dim(), act_dim = this->act_dim();
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

  // Passes sections of `input` through a network and writes output n of row v to to[n * stride + v]. The
  // inputs of hidden and last layers are stored for the sections before `kept`.
  template <int kRows>
  MOPO_DEVICE void forward(const Matrix& input, const Layer* layers, Matrix Layer::* weights, int section,
                           int kept, float* to, int stride) const {
    const int width = layers[0].in;
    __syncthreads();
    for (int i = threadIdx.x; i < kRows / 4 * width; i += kThreads) {
      const int v = i / width * 4, d = i % width;
      four(&x(d, v)) = load_column(input, row(section, v), d);
    }
    for (int l = 0; l <= hidden_count(); ++l) {
      const Layer& layer = layers[l];
      const Matrix& matrix = layer.*weights;
      const float* bias = matrix.at(layer.in);
      multiply<kRows, kStride>(x(), matrix.data, matrix.stride, layer.in, layer.out,
                               [&](int n, int v, float4 sum) {
                                 float4 y = each(sum, [b = bias[n]](float z) { return z + b; });
                                 if (l == hidden_count()) {
                                   four(to + n * stride + v) = y;
                                   return;
                                 }
                                 y = each(y, [](float z) { return z < 0.0f ? 0.0f : z; });
                                 four(&x(n, v)) = y;
                                 if (section + v / kTile < kept)
                                   store_column(layers[l + 1].inputs, row(section, v), n, y);
                               });
    }
    __syncthreads();
  }

  // The policy's actions and their log-probabilities, at kRows rows of `sections`: 0 has the observations, 1
  // the next observations.
  template <int kRows>
  MOPO_DEVICE void act(int section) const {
    const int act_dim = this->act_dim();
    forward<kRows>(sac.observations, actor(), &Layer::value, section, 1, x(), kStride);
    float* terms = partials();
    for (int i = threadIdx.x; i < act_dim * kRows; i += kThreads) {
      const int d = i / kRows, v = i % kRows;
      const bool next = section + v / kTile == 1;
      const PhiloxStream stream = next ? kNextActionStream : kActionStream;
      const float noise = normal(random_block(batch_row(v), step, stream, d / 4, args.seed), d % 4);
      const float raw_log_std = x(act_dim + d, v);
      const SquashedGaussian draw(x(d, v), raw_log_std, args.log_std_min, args.log_std_max, noise);
      const float action = draw.action();
      terms[i] = draw.log_prob(args.log_prob_epsilon);
      sac.pairs.at(row(section + 1, v))[obs_dim() + d] = action;
      if (next) continue;
      sac.actions.at(row(0, v))[d] = action;
      sac.spread.at(row(0, v))[d] = draw.spread;
      sac.log_std.at(row(0, v))[d] = raw_log_std;
      sac.slope.at(row(0, v))[d] = expf(draw.log_slope());
    }
    __syncthreads();
    if (threadIdx.x < kRows) {
      float log_prob = 0.0f;
      for (int d = 0; d < act_dim; ++d) log_prob += terms[d * kRows + threadIdx.x];
      log_probs()[section * kTile + threadIdx.x] = log_prob;
      if (section * kTile + threadIdx.x < kTile) add(kLogProb, log_prob);
    }
  }

  // Stores the number x of this thread's row for a sum over the batch.
  MOPO_DEVICE void add(int sum, double x) const {
    const int row = first + threadIdx.x;
    if (row < sac.batch) sac.sums[sum * sac.batch + row] = x;
  }

  MOPO_DEVICE void evaluate_targets() const {
    each_target_critic(args, step, [&](int64_t place, int64_t j) {
      forward<kTile>(sac.pairs, critic(static_cast<int>(j)), &Layer::target, 2, 0,
                     q(static_cast<int>(place)) + 2 * kTile, 0);
    });
    if (threadIdx.x >= kTile) return;
    const int v = threadIdx.x;
    float least = q(0)[2 * kTile + v];
    for (int place = 1; place < args.target_critics; ++place) {
      const float other = q(place)[2 * kTile + v];
      if (other < least || other != other) least = other;
    }
    const float target = td_target(args, rewards()[v], discounts()[v], least, alpha, log_probs()[kTile + v]);
    targets()[v] = target < args.target_min ? args.target_min : target;
  }

  // The critics forwards and backwards, from `section` on: section 0 is for their own loss, 1 for the
  // policy's.
  MOPO_DEVICE void critics(int section) const {
    for (int j = 0; j < args.critics; ++j)
      forward<kCriticRows>(sac.pairs, critic(j), &Layer::value, section, 2, q(j) + section * kTile, 0);
    const int v = threadIdx.x;
    int least = 0;
    if (v < kTile && has_data(section)) {
      double sum = 0.0;
      for (int j = 0; j < args.critics; ++j) {
        const double error = static_cast<double>(q(j)[v]) - targets()[v];
        add(kSquares + j, error * error);
        sum += q(j)[v];
      }
      add(kValues, sum);
    }
    if (v < kTile && has_policy(section)) {
      for (int j = 1; j < args.critics; ++j)
        if (q(j)[kTile + v] < q(least)[kTile + v]) least = j;
      add(kActorValue, actor_value(args, [&](int64_t j) { return q(static_cast<int>(j))[kTile + v]; }));
    }
    const float inverse_batch = 1.0f / static_cast<float>(sac.batch);
    const float scale = 2.0f * args.critic_loss_scale * inverse_batch;
    for (int j = 0; j < args.critics; ++j) {
      __syncthreads();
      if (v < kTile && has_data(section)) q_grads()[v] = scale * (q(j)[v] - targets()[v]);
      if (v < kTile && has_policy(section))
        q_grads()[kTile + v] = args.mean_actor ? -inverse_batch / static_cast<float>(args.critics)
                               : least == j    ? -inverse_batch
                                               : 0.0f;
      __syncthreads();
      critic_backward(j, section);
    }
  }

  MOPO_DEVICE void critic_backward(int j, int section) const {
    const Layer *layers = critic(j), &head = layers[hidden_count()];
    for (int i = threadIdx.x; i < kCriticRows / 4 * head.in; i += kThreads) {
      const int v = i / head.in * 4, k = i % head.in;
      const float4 outputs = load_column(head.inputs, row(section, v), k);
      const float4 grads =
          each(outputs, four(q_grads() + section * kTile + v),
               [w = *head.value.at(k)](float output, float grad) { return output > 0.0f ? grad * w : 0.0f; });
      four(&x(k, v)) = grads;
      if (section + v / kTile == 0) store_column(layers[hidden_count() - 1].grads, row(0, v), k, grads);
    }
    if (has_data(section) && threadIdx.x < kTile)
      *head.grads.at(first + threadIdx.x) = q_grads()[threadIdx.x];
    backward<kCriticRows>(layers, hidden_count() - 1, section, has_policy(section) ? 0 : 1, j > 0);
  }

  // Backwards from the outputs of layer `top` to the pre-activations below layer `bottom`. Below the critics'
  // layer 0 lie the actions, whose gradients are added up over the critics: `adds` for all but the first.
  template <int kRows>
  MOPO_DEVICE void backward(const Layer* layers, int top, int section, int bottom, bool adds) const {
    for (int l = top; l >= bottom; --l) {
      const Layer& layer = layers[l];
      // Only the actions among the first layer's inputs are needed, from a multiple of four on.
      const int begin = l == 0 ? obs_dim() / 4 * 4 : 0;
      multiply<kRows, kStride>(
          x(), layer.transposed.data + begin, layer.transposed.stride, layer.out, layer.in - begin,
          [&](int k, int v, float4 sum) {
            if (l > 0) {
              const float4 grads = each(sum, load_column(layer.inputs, row(section, v), k),
                                        [](float grad, float output) { return output > 0.0f ? grad : 0.0f; });
              four(&x(k, v)) = grads;
              if (section + v / kTile == 0) store_column(layers[l - 1].grads, row(0, v), k, grads);
              return;
            }
            const int d = begin + k - obs_dim();
            if (d < 0 || section + v / kTile == 0) return;
            const int to = first + v % kTile;
            if (adds)
              sum = each(sum, load_column(sac.action_grad, to, d), [](float a, float b) { return a + b; });
            store_column(sac.action_grad, to, d, sum);
          });
    }
  }

  // From the gradients of Q by the actions to those of the actor's layers.
  MOPO_DEVICE void actor_backward() const {
    const float inverse_batch = 1.0f / static_cast<float>(sac.batch);
    const int act_dim = this->act_dim();
    const Layer& head = actor()[hidden_count()];
    __syncthreads();
    for (int i = threadIdx.x; i < act_dim * kTile; i += kThreads) {
      const int d = i / kTile, v = i % kTile;
      const auto grad = squashed_gradient(sac.actions.at(row(0, v))[d], sac.spread.at(row(0, v))[d],
                                          sac.log_std.at(row(0, v))[d], args.log_std_min, args.log_std_max,
                                          args.log_prob_epsilon, sac.slope.at(row(0, v))[d],
                                          sac.action_grad.at(row(0, v))[d], alpha, inverse_batch);
      head.grads.at(row(0, v))[d] = x(d, v) = grad.mean;
      head.grads.at(row(0, v))[act_dim + d] = x(act_dim + d, v) = grad.log_std;
    }
    backward<kTile>(actor(), hidden_count(), 0, 1, false);
  }
};

// Adds the update's metrics of the policy, and steps the temperature.
MOPO_DEVICE void finish_policy(const Sac& sac, const AdamStep& step) {
  const SacArgs& args = sac.args;
  const double* sums = add_up(sac.sums, kPolicySums, sac.batch);
  if (threadIdx.x > 0) return;
  const double count = sac.batch, entropy = -sums[kLogProb] / count;
  const double gradient = entropy - args.target_entropy;
  sac.metrics[kAlphaLoss] += *args.log_alpha.value * gradient;
  const float before = temperature(args);
  adam(step, args.log_alpha, 0, static_cast<float>(gradient));
  const double used = args.order == SacOrder::kActorFirst ? temperature(args) : before;
  sac.metrics[kActorLoss] += -used * entropy - sums[kActorValue] / count;
  sac.metrics[kAlpha] += used;
  sac.metrics[kEntropy] += entropy;
}

// Adds the update's metrics of the critics, which are of their parameters before it.
MOPO_DEVICE void finish_critics(const Sac& sac) {
  const int columns = kSquares - kValues + static_cast<int>(sac.args.critics);
  const double* sums = add_up(sac.sums + kValues * sac.batch, columns, sac.batch);
  if (threadIdx.x > 0) return;
  add_critic_metrics(
      sac.args, sac.batch, sums[0], [&](int64_t j) { return sums[kSquares - kValues + j]; }, sac.metrics);
}

// Runs function(tile) for each of this block's tiles of an update's batch.
template <int kTile, bool kBoth, class Function>
MOPO_DEVICE void each_tile(const Group& group, const Sac& sac, int64_t update, Function function) {
  const float alpha = temperature(sac.args);
  for (int first = group.block * kTile; first < sac.batch; first += group.blocks * kTile)
    function(SacTile<kTile, kBoth>{sac, sac.args, alpha, static_cast<uint32_t>(sac.args.first_draw + update),
                                   first});
}

// An update is one pass with kSimultaneous: the gradients of critics and actor, then their parameters. With
// kCriticFirst it is two: the critics' parameters move before the policy's actions pass through them. With
// kActorFirst, the temperature moves before the actor's gradients, and the actor before the critics'.
template <int kTile, SacOrder kOrder>
__global__ void __launch_bounds__(kThreads, 1) sac_kernel(const __grid_constant__ Launch<Sac> launch) {
  const Sac& sac = launch.runs[blockIdx.x / launch.blocks];
  const SacArgs& args = sac.args;
  const int critic_layers = static_cast<int>(args.critics * args.depth);
  const int layers = critic_layers + static_cast<int>(args.depth);
  Group group{launch.blocks, static_cast<int>(blockIdx.x) % launch.blocks, sac.counter};
  const bool last = group.block == group.blocks - 1;
  for (int l = 0; l < layers; ++l)
    copy_parameters(group, sac.layers[l], sac.rows, kOrder == SacOrder::kActorFirst ? args.polyak : 0.0f);
  const auto train = [&](int begin, int end, const SacSteps& steps) {
    int next = group.block;
    for (int l = begin; l < end; ++l)
      train_layer(group, sac.layers[l], l < critic_layers ? steps.critic : steps.actor, sac.batch, next);
  };
  for (int64_t update = 0; update < args.updates; ++update) {
    const SacSteps& steps = sac.steps[update];
    group.wait();
    if constexpr (kOrder == SacOrder::kActorFirst) {
      each_tile<kTile, false>(group, sac, update, [](const auto& tile) {
        tile.draw();
        tile.gather();
        tile.template act<kTile>(0);
        tile.critics(1);
      });
      group.wait();
      if (last) finish_policy(sac, steps.alpha);
      group.wait();
      each_tile<kTile, false>(group, sac, update, [](const auto& tile) { tile.actor_backward(); });
      group.wait();
      train(critic_layers, layers, steps);
      group.wait();
      each_tile<kTile, false>(group, sac, update, [](const auto& tile) {
        tile.draw();
        tile.template act<kTile>(1);
        tile.evaluate_targets();
        tile.critics(0);
      });
      group.wait();
      train(0, critic_layers, steps);
      if (last) finish_critics(sac);
    } else {
      constexpr bool kBoth = kOrder == SacOrder::kSimultaneous;
      each_tile<kTile, kBoth>(group, sac, update, [](const auto& tile) {
        tile.draw();
        tile.gather();
        tile.template act<2 * kTile>(0);
        tile.evaluate_targets();
        tile.critics(0);
        if constexpr (kBoth) tile.actor_backward();
      });
      group.wait();
      if constexpr (!kBoth) {
        train(0, critic_layers, steps);
        group.wait();
        each_tile<kTile, kBoth>(group, sac, update, [](const auto& tile) {
          tile.critics(1);
          tile.actor_backward();
        });
        group.wait();
      }
      train(kBoth ? 0 : critic_layers, layers, steps);
      if (!last) continue;
      finish_policy(sac, steps.alpha);
      finish_critics(sac);
    }
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
  for (Matrix* each : {&sac.actions, &sac.spread, &sac.log_std, &sac.slope, &sac.action_grad})
    *each = memory.take_matrix(rows, args.act_dim);
  std::vector<Layer> layers;
  const auto take = [&](const TrainedLayer* from, int64_t network, Matrix inputs, int sections,
                        bool to_the_inputs) {
    for (int64_t l = 0; l < args.depth; ++l) {
      if (l > 0) inputs = memory.take_matrix(sections * rows, from[l].in + 1);
      layers.push_back(memory.take_layer(from[l], network, inputs, rows, l > 0 || to_the_inputs));
    }
  };
  for (int64_t j = 0; j < args.critics; ++j) take(args.critic, j, sac.pairs, 2, true);
  take(args.actor, 0, sac.observations, 1, false);
  sac.layers = memory.put(layers);
  sac.sums = memory.take<double>((kSquares + args.critics) * sac.batch);
  std::vector<SacSteps> steps;
  for (int64_t update = 0; update < args.updates; ++update) steps.push_back(sac_steps(args, update));
  sac.steps = memory.put(steps);
  sac.metrics = metrics;
  sac.counter = memory.put(std::vector<uint32_t>{0});
  return sac;
}

auto kernel_of(SacOrder order, bool large) {
  switch (order) {
    case SacOrder::kSimultaneous:
      return large ? sac_kernel<8, SacOrder::kSimultaneous> : sac_kernel<4, SacOrder::kSimultaneous>;
    case SacOrder::kCriticFirst:
      return large ? sac_kernel<8, SacOrder::kCriticFirst> : sac_kernel<4, SacOrder::kCriticFirst>;
    default:
      return large ? sac_kernel<8, SacOrder::kActorFirst> : sac_kernel<4, SacOrder::kActorFirst>;
  }
}

}  // namespace

cudaError_t sac_updates(const std::vector<SacArgs>& runs, double* metrics, const Allocate& allocate,
                        cudaStream_t cuda_stream) {
  const SacArgs& first = runs.front();
  const int widest_layer = std::max(widest(first.actor, first.depth), widest(first.critic, first.depth));
  const int floats =
      9 + 3 * static_cast<int>(first.critics) + 2 * widest_layer;  // of shared memory, for each row of a tile
  return each_launch(runs, [&](const SacArgs* some, int count, int blocks, const Device& device) {
    const bool large =
        first.real_rows + first.model_rows > 4 * blocks && shared_bytes(8 * floats) <= device.shared_bytes;
    return launch_with_memory(
        allocate, cuda_stream,
        [&](Memory& memory) {
          std::vector<Sac> all;
          for (const SacArgs* args = some; args < some + count; ++args)
            all.push_back(lay_out(memory, *args, metrics + (args - runs.data()) * sac_metrics(first)));
          return Launch<Sac>{memory.put(all), blocks};
        },
        [&](const Launch<Sac>& launch) {
          const auto kernel = kernel_of(first.order, large);
          return ptx::launch_together(kernel, count * blocks, kThreads,
                                      shared_bytes((large ? 8 : 4) * floats), cuda_stream, launch);
        });
  });
}

}  // namespace mopo::cuda
