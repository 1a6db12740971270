// Shared by the kernels of SAC and the fit. A group of blocks trains one run. A step has two phases, which
// all blocks of the group begin together: rows, in which a block takes tiles of the batch through the
// networks and back; and parameters, in which it takes squares of the gradients straight into Adam. The order
// of every sum depends only on the sizes of networks and batch, not on the number of blocks or the rows of a
// tile.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/ptx.cuh"
#include "cuda/training_launch.h"
#include "scalar.h"

namespace mopo::cuda {

constexpr int kThreads = 256;

MOPO_INLINE int round_up(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

// A row-major matrix.
struct Matrix {
  float* data;
  int stride;
  MOPO_DEVICE float* at(int row) const { return ptx::global(data + static_cast<int64_t>(row) * stride); }
};

// A layer of one network. `target` has no data where the layer has no target, `transposed` where no gradient
// passes through it.
struct Layer {
  int in, out;
  Parameter weight, bias;  // the caller's
  Matrix value, target;    // [in + 1][out], copies of both, the bias last
  Matrix transposed;       // [out][in], of the weights
  Matrix inputs;           // [rows][in + 1]; the last column is ones, for the bias
  Matrix grads;            // [rows][out], of the loss by the pre-activations
};

// ---- Host ----

// A launch's device memory: pieces of one allocation, and behind them an image of the host's arrays.
// Everything is taken twice: first to add up the sizes, then with the allocation at `base`.
struct Memory {
  char* base = nullptr;
  size_t image_at = 0;
  size_t used = 0;
  std::vector<char> image{};

  template <class T>
  T* take(size_t count) {
    T* result = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 255) / 256 * 256;
    return result;
  }
  // Rows begin at multiples of four numbers, for loads of 16 bytes.
  Matrix take_matrix(int64_t rows, int64_t columns) {
    const int stride = round_up(static_cast<int>(columns), 4);
    return {take<float>(rows * stride), stride};
  }
  Layer take_layer(const TrainedLayer& from, int64_t network, Matrix inputs, int64_t rows, bool backwards) {
    const auto mine = [network](const Parameter& whole, int64_t size) {
      float* target = whole.target == nullptr ? nullptr : whole.target + network * size;
      return Parameter{whole.value + network * size, whole.exp_avg + network * size,
                       whole.exp_avg_sq + network * size, target};
    };
    Layer layer{};
    layer.in = static_cast<int>(from.in);
    layer.out = static_cast<int>(from.out);
    layer.weight = mine(from.weight, from.in * from.out);
    layer.bias = mine(from.bias, from.out);
    layer.value = take_matrix(from.in + 1, from.out);
    if (from.weight.target != nullptr) layer.target = take_matrix(from.in + 1, from.out);
    if (backwards) layer.transposed = take_matrix(from.out, from.in);
    layer.inputs = inputs;
    layer.grads = take_matrix(rows, from.out);
    return layer;
  }
  // Puts an array into the image; returns its address on the device.
  template <class T>
  T* put(const std::vector<T>& array) {
    const size_t at = (image.size() + 15) / 16 * 16, bytes = array.size() * sizeof(T);
    image.resize(at + bytes);
    std::memcpy(image.data() + at, array.data(), bytes);
    return reinterpret_cast<T*>(base + image_at + at);
  }
};

// Allocates memory for lay_out(memory), copies its image to the device, calls launch(args) and waits for the
// kernel: the asynchronous copy may read the image until then.
template <class LayOut, class Launch>
cudaError_t launch_with_memory(const Allocate& allocate, cudaStream_t cuda_stream, LayOut lay_out,
                               Launch launch) {
  Memory sizes;
  lay_out(sizes);
  Memory memory{static_cast<char*>(allocate(sizes.used + sizes.image.size())), sizes.used};
  const auto args = lay_out(memory);
  cudaError_t error = cudaMemcpyAsync(memory.base + memory.image_at, memory.image.data(), memory.image.size(),
                                      cudaMemcpyHostToDevice, cuda_stream);
  if (error == cudaSuccess) error = launch(args);
  const cudaError_t waited = cudaStreamSynchronize(cuda_stream);
  return error == cudaSuccess ? waited : error;
}

// A kernel's argument: the runs, and the number of blocks of each.
template <class Run>
struct Launch {
  const Run* runs;
  int blocks;
};

struct Device {
  int multiprocessors;
  int shared_bytes;  // of a block, at most
};

// Calls launch(first run, number of runs, blocks for each, device), once or more: the blocks of a launch run
// at the same time, one on each multiprocessor, so it takes no more runs than there are of these.
template <class Args, class LaunchRuns>
cudaError_t each_launch(const std::vector<Args>& runs, LaunchRuns launch) {
  Device device{};
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  const int all = static_cast<int>(runs.size());
  for (int first = 0, count; error == cudaSuccess && first < all; first += count) {
    count = std::min(all - first, device.multiprocessors);
    error = launch(runs.data() + first, count, device.multiprocessors / count, device);
  }
  return error;
}

inline int widest(const TrainedLayer* layers, int64_t depth) {
  int64_t result = 0;
  for (int64_t l = 0; l < depth; ++l) result = std::max({result, layers[l].in, layers[l].out});
  return static_cast<int>(result);
}

// ---- Device: a group of blocks ----

struct Group {
  const int blocks, block;
  uint32_t* const counter;
  uint32_t awaited = 0;

  // Waits for all blocks of the group, and makes what they have written visible.
  MOPO_DEVICE void wait() {
    __syncthreads();
    awaited += blocks;
    if (threadIdx.x == 0) {
      ptx::arrive(counter);
      ptx::wait_for(counter, awaited);
    }
    __syncthreads();
  }
};

// ---- Device: shared memory: partial sums, then a tile's activations and what else a kernel keeps there ----

// Floats of the partial sums: 4 columns a thread, padded by an eighth, of 8 rows at a time.
constexpr int kPartials = 4 * kThreads / 8 * 9 * 8;

MOPO_DEVICE float* partials() { return reinterpret_cast<float*>(ptx::dynamic_shared()); }
MOPO_DEVICE float* activations() { return partials() + kPartials; }
inline int shared_bytes(int activations) {
  return (kPartials + activations) * static_cast<int>(sizeof(float));
}

MOPO_DEVICE float4& four(float* at) { return *reinterpret_cast<float4*>(at); }
MOPO_DEVICE float4 four(const float* at) { return *reinterpret_cast<const float4*>(at); }

// The product x^T m of kRows columns of x [count][kStride], in shared memory, and m [count][columns], in
// global memory. All threads call it; a thread calls visit(column, row, sums) for four rows from `row` on.
// The threads wait for one another before, and visit may write to x.
//
// A thread sums four columns for all rows over a slice of `count`; the slices' sums are then added up in
// order. The number of slices depends on `columns` alone.
template <int kRows, int kStride, class Visit>
MOPO_DEVICE void multiply(const float* x, const float* m, int stride, int count, int columns, Visit visit) {
  constexpr int kAtOnce = kRows < 8 ? kRows : 8, kMostSlices = 32;
  const int quads = (columns + 3) / 4, slices = min(kMostSlices, kThreads / quads);
  const int slice = threadIdx.x / quads, quad = threadIdx.x % quads;
  float sums[4][kRows] = {};
  __syncthreads();
  if (slice < slices) {
    const int end = (slice + 1) * count / slices;
#pragma unroll(kRows > 8 ? 4 : 8)
    for (int k = slice * count / slices; k < end; ++k) {
      const float4 weights = four(ptx::global(m) + k * stride + 4 * quad);
#pragma unroll
      for (int row = 0; row < kRows; row += 4) {
        const float4 inputs = four(x + k * kStride + row);
        const float in[4] = {inputs.x, inputs.y, inputs.z, inputs.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[0][row + i] = fmaf(weights.x, in[i], sums[0][row + i]);
          sums[1][row + i] = fmaf(weights.y, in[i], sums[1][row + i]);
          sums[2][row + i] = fmaf(weights.z, in[i], sums[2][row + i]);
          sums[3][row + i] = fmaf(weights.w, in[i], sums[3][row + i]);
        }
      }
    }
  }
  // Partial sums of a slice, four rows and a column. The padding avoids bank conflicts.
  const auto place = [&](int of, int rows, int column) {
    const int padded = 4 * quads + quads / 2;
    return partials() + 4 * ((of * (kAtOnce / 4) + rows) * padded + column + column / 8);
  };
#pragma unroll
  for (int first = 0; first < kRows; first += kAtOnce) {
    if (first > 0) __syncthreads();
    if (slice < slices) {
#pragma unroll
      for (int row = 0; row < kAtOnce; row += 4)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* sum = sums[i] + first + row;
          four(place(slice, row / 4, 4 * quad + i)) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kAtOnce / 4 * columns; i += kThreads) {
      const int rows = i / columns, column = i % columns;
      float4 sum = four(place(0, rows, column));
      for (int of = 1; of < slices; ++of) {
        const float4 part = four(place(of, rows, column));
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
      }
      visit(column, first + 4 * rows, sum);
    }
  }
}

// Four rows' values in one column of a matrix.
MOPO_DEVICE void store_column(const Matrix& matrix, int row, int column, float4 x) {
  float* to = matrix.at(row) + column;
  to[0] = x.x;
  to[matrix.stride] = x.y;
  to[2 * matrix.stride] = x.z;
  to[3 * matrix.stride] = x.w;
}
MOPO_DEVICE float4 load_column(const Matrix& matrix, int row, int column) {
  const float* from = matrix.at(row) + column;
  return make_float4(from[0], from[matrix.stride], from[2 * matrix.stride], from[3 * matrix.stride]);
}
template <class Function>
MOPO_DEVICE float4 each(float4 x, Function function) {
  return make_float4(function(x.x), function(x.y), function(x.z), function(x.w));
}
template <class Function>
MOPO_DEVICE float4 each(float4 x, float4 y, Function function) {
  return make_float4(function(x.x, y.x), function(x.y, y.y), function(x.z, y.z), function(x.w, y.w));
}

// ---- Device: parameters ----

// One step of Adam on number `at` of a parameter; returns the new value.
MOPO_DEVICE float adam(const AdamStep& step, const Parameter& parameter, int at, float gradient) {
  float& value = ptx::global(parameter.value)[at];
  adam<float>(step, gradient, value, ptx::global(parameter.exp_avg)[at],
              ptx::global(parameter.exp_avg_sq)[at]);
  return value;
}

// Moves number `at` of a parameter's target towards its value; returns the new target.
MOPO_DEVICE float move_target(const Parameter& parameter, int at, float value, float polyak) {
  float& target = ptx::global(parameter.target)[at];
  return target = target + (value - target) * polyak;
}

// The place of number [k][n] of a layer's matrix in the caller's arrays.
struct Place {
  const Parameter& parameter;
  int at;
};
MOPO_DEVICE Place place(const Layer& layer, int k, int n) {
  return k < layer.in ? Place{layer.weight, k * layer.out + n} : Place{layer.bias, n};
}

// One step of Adam on kHalf x kHalf numbers of a layer's matrix. Their gradients are the sums of `parts`
// parts in shared memory.
constexpr int kHalf = 32;
MOPO_DEVICE void step_quarter(const Layer& layer, const AdamStep& step, int begin_k, int begin_n, int parts) {
  float* values = partials() + parts * kHalf * kHalf;  // with one more column, against bank conflicts
  for (int i = threadIdx.x; i < kHalf * kHalf; i += kThreads) {
    const int k = begin_k + i / kHalf, n = begin_n + i % kHalf;
    if (k > layer.in || n >= layer.out) continue;
    float gradient = 0.0f;
    for (int part = 0; part < parts; ++part) gradient += partials()[part * kHalf * kHalf + i];
    const auto [parameter, at] = place(layer, k, n);
    if (k < layer.in) gradient += step.weight_decay * parameter.value[at];
    const float value = adam(step, parameter, at, gradient);
    layer.value.at(k)[n] = value;
    if (layer.target.data != nullptr) layer.target.at(k)[n] = move_target(parameter, at, value, step.polyak);
    values[i / kHalf * (kHalf + 1) + i % kHalf] = value;
  }
  if (layer.transposed.data == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < kHalf * kHalf; i += kThreads) {
    const int k = begin_k + i % kHalf, n = begin_n + i / kHalf;
    if (k < layer.in && n < layer.out)
      layer.transposed.at(n)[k] = values[i % kHalf * (kHalf + 1) + i / kHalf];
  }
}

// One step of Adam on a square of a layer's matrix, with the gradient inputs^T grads over `count` rows. A
// thread sums 8 x 8 numbers, in groups of four that lie kHalf apart, over every kSlices-th row.
constexpr int kSquare = 2 * kHalf;
MOPO_DEVICE int squares(const Layer& layer) {
  return (layer.in / kSquare + 1) * ((layer.out + kSquare - 1) / kSquare);
}
MOPO_DEVICE void train_square(const Layer& layer, const AdamStep& step, int count, int square) {
  constexpr int kCells = kHalf / 4, kSlices = kThreads / (kCells * kCells);
  const int across = (layer.out + kSquare - 1) / kSquare;
  const int first_k = square / across * kSquare, first_n = square % across * kSquare;
  const int slice = threadIdx.x / (kCells * kCells), cell = threadIdx.x % (kCells * kCells);
  const int cell_k = cell / kCells * 4, cell_n = cell % kCells * 4;
  float sums[8][8] = {};
  const int k = first_k + cell_k, n = first_n + cell_n;
  if (k <= layer.in && n < layer.out) {
    const float *inputs = layer.inputs.at(0) + k, *grads = layer.grads.at(0) + n;
    // Beyond the matrix the near numbers are read again; step_quarter leaves their sums alone.
    const int far_k = k + kHalf <= layer.in ? kHalf : 0, far_n = n + kHalf < layer.out ? kHalf : 0;
#pragma unroll 4
    for (int row = slice; row < count; row += kSlices) {
      const float *x = inputs + row * layer.inputs.stride, *g = grads + row * layer.grads.stride;
      const float4 near_x = four(x), far_x = four(x + far_k), near_g = four(g), far_g = four(g + far_n);
      const float in[8] = {near_x.x, near_x.y, near_x.z, near_x.w, far_x.x, far_x.y, far_x.z, far_x.w};
      const float out[8] = {near_g.x, near_g.y, near_g.z, near_g.w, far_g.x, far_g.y, far_g.z, far_g.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int o = 0; o < 8; ++o) sums[i][o] = fmaf(in[i], out[o], sums[i][o]);
    }
  }
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int i = quarter / 2 * 4, o = quarter % 2 * 4;
    const int begin_k = first_k + quarter / 2 * kHalf, begin_n = first_n + quarter % 2 * kHalf;
    if (begin_k > layer.in || begin_n >= layer.out) continue;
    __syncthreads();
#pragma unroll
    for (int each = i; each < i + 4; ++each)
      four(partials() + (slice * kHalf + cell_k + each - i) * kHalf + cell_n) =
          make_float4(sums[each][o], sums[each][o + 1], sums[each][o + 2], sums[each][o + 3]);
    __syncthreads();
    step_quarter(layer, step, begin_k, begin_n, kSlices);
  }
}

// This block's squares of a layer: the squares of all layers are dealt out to the group's blocks in turn.
// `next` is the block's next square in this layer, and afterwards in the layer that follows.
MOPO_DEVICE void train_layer(const Group& group, const Layer& layer, const AdamStep& step, int count,
                             int& next) {
  const int all = squares(layer);
  for (; next < all; next += group.blocks) train_square(layer, step, count, next);
  next -= all;
}

// Fills in the copies of a layer's parameters, after a move of its target, and the column of ones.
MOPO_DEVICE void copy_parameters(const Group& group, const Layer& layer, int rows, float polyak = 0.0f) {
  const int first = group.block * kThreads + threadIdx.x, apart = group.blocks * kThreads;
  for (int i = first; i < (layer.in + 1) * layer.out; i += apart) {
    const int k = i / layer.out, n = i % layer.out;
    const auto [parameter, at] = place(layer, k, n);
    const float value = parameter.value[at];
    layer.value.at(k)[n] = value;
    if (layer.target.data != nullptr)
      layer.target.at(k)[n] =
          polyak > 0.0f ? move_target(parameter, at, value, polyak) : parameter.target[at];
    if (layer.transposed.data != nullptr && k < layer.in) layer.transposed.at(n)[k] = value;
  }
  for (int row = first; row < rows; row += apart) layer.inputs.at(row)[layer.in] = 1.0f;
}

// Sums of `columns` arrays of `count` numbers each, returned in shared memory. Lanes sum every 32nd number,
// and lane 0 adds up the lanes in order.
MOPO_DEVICE const double* add_up(const double* arrays, int columns, int count) {
  double *shares = reinterpret_cast<double*>(partials()), *sums = shares + kThreads;
  __syncthreads();
  for (int column = threadIdx.x / 32; column < columns; column += kThreads / 32) {
    double sum = 0.0;
    for (int i = threadIdx.x % 32; i < count; i += 32) sum += arrays[column * count + i];
    shares[threadIdx.x] = sum;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      for (int lane = 1; lane < 32; ++lane) sum += shares[threadIdx.x + lane];
      sums[column] = sum;
    }
    __syncwarp();
  }
  __syncthreads();
  return sums;
}

}  // namespace mopo::cuda
