// Steps of the ensemble's fit in CUDA, the counterpart of csrc/cpu/fit.inl.
#include "cuda/train.cuh"

namespace mopo::cuda {

// Rows of a partial sum of losses and of gradients by the bounds, the same for every tile size.
constexpr int kSummed = 4;

// One run.
struct Fit {
  FitArgs args;         // its layers are the host's; the device has
  const Layer* layers;  // [members][depth]
  double* sums;         // [max_logvar's gradient, min_logvar's, loss][dims][members][groups of kSummed rows]
  const AdamStep* steps;  // [steps][depth + 1]: layers, then the bounds
  double* loss;
  uint32_t* counter;
};

// The activation at z and its derivative.
MOPO_DEVICE float activate(Activation activation, float z, float& slope) {
  if (activation == Activation::kSilu) {
    const float gate = 1.0f / (1.0f + expf(-z)), y = z * gate;
    slope = gate + y * (1.0f - gate);
    return y;
  }
  if (activation == Activation::kTanh) {
    const float y = tanhf(z);
    slope = 1.0f - y * y;
    return y;
  }
  slope = z > 0.0f ? 1.0f : 0.0f;
  return z < 0.0f ? 0.0f : z;
}

// Rows first .. first + kTile of a member's batch, which is `count` rows from `begin` on in the member's
// pass.
template <int kTile>
struct FitTile {
  const Fit& fit;
  const FitArgs& args;
  const int begin, count, member, first;

  // The inputs or gradients that pass through a layer, [width][kTile].
  MOPO_DEVICE float* x() const { return activations(); }
  MOPO_DEVICE float& x(int column, int row) const { return x()[column * kTile + row]; }

  MOPO_DEVICE int depth() const { return static_cast<int>(args.depth); }
  MOPO_DEVICE int dims() const { return static_cast<int>(args.dims); }
  MOPO_DEVICE const Layer& layer(int l) const { return fit.layers[member * depth() + l]; }

  // Rows of the last tile beyond the batch repeat the batch's last row, and enter no sum.
  MOPO_DEVICE int64_t drawn(int v) const {
    return args.rows[member * args.rows_stride + begin + min(first + v, count - 1)] * args.stride;
  }

  MOPO_DEVICE void forward() const {
    const int width = layer(0).in;
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * width; i += kThreads) {
      const int v = i / width, d = i % width;
      layer(0).inputs.at(first + v)[d] = x(d, v) = args.inputs[drawn(v) + d];
    }
    for (int l = 0; l < depth(); ++l) {
      const Layer& here = layer(l);
      const float* bias = here.value.at(here.in);
      multiply<kTile, kTile>(x(), here.value.data, here.value.stride, here.in, here.out,
                             [&](int n, int v, float4 sum) {
                               float4 y = each(sum, [b = bias[n]](float z) { return z + b; });
                               if (l < depth() - 1) {
                                 float4 slopes;
                                 y = activate(y, slopes);
                                 store_column(layer(l + 1).inputs, first + v, n, y);
                                 // The derivatives lie here until the backward pass overwrites them.
                                 store_column(here.grads, first + v, n, slopes);
                               }
                               four(&x(n, v)) = y;
                             });
    }
    __syncthreads();
  }

  MOPO_DEVICE float4 activate(float4 z, float4& slopes) const {
    const auto one = [&](float x, float& slope) { return cuda::activate(args.activation, x, slope); };
    return make_float4(one(z.x, slopes.x), one(z.y, slopes.y), one(z.z, slopes.z), one(z.w, slopes.w));
  }

  // The Gaussian negative log-likelihood, and its gradient by the last layer's outputs and by the bounds.
  MOPO_DEVICE void differentiate_loss() const {
    const int dims = this->dims();
    const float inverse_count = 1.0f / static_cast<float>(count * dims);
    const Layer& head = layer(depth() - 1);
    const int groups = (count + kSummed - 1) / kSummed;
    for (int i = threadIdx.x; i < dims * (kTile / kSummed); i += kThreads) {
      const int d = i % dims, part = i / dims * kSummed, group = (first + part) / kSummed;
      const float max_logvar = args.max_logvar.value[d];
      const float exp_minus_max = expf(-max_logvar), exp_min = expf(args.min_logvar.value[d]);
      double max_grad = 0.0, min_grad = 0.0, loss = 0.0;
#pragma unroll
      for (int v = part; v < part + kSummed; ++v) {
        const float raw = x(dims + d, v), error = x(d, v) - args.targets[drawn(v) + d];
        const auto one = likelihood(error, raw, max_logvar, exp_minus_max, exp_min, inverse_count);
        head.grads.at(first + v)[d] = x(d, v) = one.mean_grad;
        head.grads.at(first + v)[dims + d] = x(dims + d, v) = one.raw_grad;
        if (first + v >= count) continue;
        max_grad += one.max_grad;
        min_grad += one.min_grad;
        loss += one.loss * inverse_count;
      }
      if (group >= groups) continue;
      const int members = static_cast<int>(args.members), to = (d * members + member) * groups + group;
      fit.sums[to] = max_grad;
      fit.sums[dims * members * groups + to] = min_grad;
      fit.sums[2 * dims * members * groups + to] = loss;
    }
  }

  MOPO_DEVICE void backward() const {
    for (int l = depth() - 1; l > 0; --l) {
      const Layer &here = layer(l), &below = layer(l - 1);
      multiply<kTile, kTile>(x(), here.transposed.data, here.transposed.stride, here.out, here.in,
                             [&](int k, int v, float4 sum) {
                               const float4 slopes = load_column(below.grads, first + v, k);
                               const float4 grads = each(sum, slopes, [](float a, float b) { return a * b; });
                               four(&x(k, v)) = grads;
                               store_column(below.grads, first + v, k, grads);
                             });
    }
  }
};

// Steps the bounds by the gradients of all members, and adds the step's loss.
MOPO_DEVICE void train_bounds(const Fit& fit, const AdamStep& step, int count) {
  const FitArgs& args = fit.args;
  const int dims = static_cast<int>(args.dims), groups = (count + kSummed - 1) / kSummed;
  const double* sums = add_up(fit.sums, 3 * dims, static_cast<int>(args.members) * groups);
  const double weight = args.logvar_bound_weight;
  if (threadIdx.x == 0) {
    double loss = 0.0;
    for (int d = 0; d < dims; ++d)
      loss += sums[2 * dims + d] + weight * (args.max_logvar.value[d] - args.min_logvar.value[d]);
    *fit.loss += loss;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < dims; d += kThreads) {
    adam(step, args.max_logvar, d, static_cast<float>(weight + sums[d]));
    adam(step, args.min_logvar, d, static_cast<float>(sums[dims + d] - weight));
  }
}

template <int kTile>
__global__ void __launch_bounds__(kThreads, 1) fit_kernel(const __grid_constant__ Launch<Fit> launch) {
  const Fit& fit = launch.runs[blockIdx.x / launch.blocks];
  const FitArgs& args = fit.args;
  const int members = static_cast<int>(args.members), depth = static_cast<int>(args.depth);
  const int all = static_cast<int>(args.count), batch = min(static_cast<int>(args.batch), all);
  Group group{launch.blocks, static_cast<int>(blockIdx.x) % launch.blocks, fit.counter};
  for (int l = 0; l < members * depth; ++l) copy_parameters(group, fit.layers[l], batch);
  const AdamStep* steps = fit.steps;
  for (int begin = 0; begin < all; begin += batch, steps += depth + 1) {
    const int count = min(batch, all - begin), tiles = (count + kTile - 1) / kTile;
    group.wait();
    for (int i = group.block; i < members * tiles; i += group.blocks) {
      const FitTile<kTile> tile{fit, args, begin, count, i / tiles, i % tiles * kTile};
      tile.forward();
      tile.differentiate_loss();
      tile.backward();
    }
    group.wait();
    int next = group.block;
    for (int l = 0; l < members * depth; ++l)
      train_layer(group, fit.layers[l], steps[l % depth], count, next);
    if (group.block == group.blocks - 1) train_bounds(fit, steps[depth], count);
  }
}

namespace {

int64_t batch_of(const FitArgs& args) { return std::min(args.batch, args.count); }

Fit lay_out(Memory& memory, const FitArgs& args, double* loss) {
  Fit fit{};
  fit.args = args;
  const int rows = round_up(static_cast<int>(batch_of(args)), 16);
  std::vector<Layer> layers;
  for (int64_t member = 0; member < args.members; ++member)
    for (int64_t l = 0; l < args.depth; ++l) {
      const Matrix inputs = memory.take_matrix(rows, args.layers[l].in + 1);
      layers.push_back(memory.take_layer(args.layers[l], member, inputs, rows, l > 0));
    }
  fit.layers = memory.put(layers);
  fit.sums = memory.take<double>(3 * args.dims * args.members * rows / kSummed);
  std::vector<AdamStep> steps;
  for (int64_t begin = 0, number = args.steps_before + 1; begin < args.count; begin += args.batch, ++number) {
    for (int64_t l = 0; l < args.depth; ++l)
      steps.push_back(adam_step(args.learning_rate, number, args.weight_decay[l], 0.0f));
    steps.push_back(adam_step(args.learning_rate, number, 0.0f, 0.0f));
  }
  fit.steps = memory.put(steps);
  fit.loss = loss;
  fit.counter = memory.put(std::vector<uint32_t>{0});
  return fit;
}

}  // namespace

cudaError_t fit_steps(const std::vector<FitArgs>& runs, double* losses, const Allocate& allocate,
                      cudaStream_t cuda_stream) {
  const FitArgs& first = runs.front();
  const int floats = widest(first.layers, first.depth);  // of shared memory, for each row of a tile
  return each_launch(runs, [&](const FitArgs* some, int count, int blocks, const Device& device) {
    const bool large =
        first.members * batch_of(first) > 8 * blocks && shared_bytes(16 * floats) <= device.shared_bytes;
    return launch_with_memory(
        allocate, cuda_stream,
        [&](Memory& memory) {
          std::vector<Fit> all;
          for (const FitArgs* args = some; args < some + count; ++args)
            all.push_back(lay_out(memory, *args, losses + (args - runs.data())));
          return Launch<Fit>{memory.put(all), blocks};
        },
        [&](const Launch<Fit>& launch) {
          return ptx::launch_together(large ? fit_kernel<16> : fit_kernel<8>, count * blocks, kThreads,
                                      shared_bytes((large ? 16 : 8) * floats), cuda_stream, launch);
        });
  });
}

}  // namespace mopo::cuda
