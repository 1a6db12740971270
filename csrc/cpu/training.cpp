#include "training.h"

#include <cmath>

namespace mopo {
namespace {

// Calls visit(element of the caller's array, element of the kernels' array) for all weights and biases.
template <class Visit>
void pair_up(const TrainedLayer& layer, int64_t network, const Dense& dense, float* Parameter::* theirs,
             float* ours, Visit visit) {
  float* weight = layer.weight.*theirs + network * layer.in * layer.out;
  float* bias = layer.bias.*theirs + network * layer.out;
  const int64_t stride = dense.one_row ? 1 : dense.stride;
  for (int64_t k = 0; k <= layer.in; ++k) {
    float* row = k < layer.in ? weight + k * layer.out : bias;
    for (int64_t n = 0; n < layer.out; ++n) visit(row[n], ours[k * stride + n]);
  }
}

template <class Visit>
void pair_up_all(const TrainedLayer& layer, int64_t network, const Dense& dense, Visit visit) {
  pair_up(layer, network, dense, &Parameter::value, dense.value, visit);
  pair_up(layer, network, dense, &Parameter::exp_avg, dense.exp_avg, visit);
  pair_up(layer, network, dense, &Parameter::exp_avg_sq, dense.exp_avg_sq, visit);
  if (dense.target != nullptr) pair_up(layer, network, dense, &Parameter::target, dense.target, visit);
}

void take_parameters(Arena& arena, const TrainedLayer& layer, int64_t size, Dense& dense) {
  dense.in = layer.in;
  dense.out = layer.out;
  arena.take(dense.value, size);
  arena.take(dense.exp_avg, size);
  arena.take(dense.exp_avg_sq, size);
  if (layer.weight.target != nullptr) arena.take(dense.target, size);
}

}  // namespace

int64_t matrix_stride(int64_t width, const Kernels& kernels) {
  constexpr int64_t kLine = 16;
  return (round_up(width + kernels.rows, kLine) / kLine | 1) * kLine;
}

Rows take_rows(Arena& arena, int64_t rows, int64_t width, const Kernels& kernels) {
  Rows result{nullptr, matrix_stride(width, kernels)};
  arena.take(result.data, rows * result.stride);
  return result;
}

Dense take_dense(Arena& arena, const TrainedLayer& layer, int64_t first_input, const Kernels& kernels) {
  Dense dense{};
  dense.stride = matrix_stride(layer.out, kernels);
  take_parameters(arena, layer, round_up(layer.in + 1, kernels.rows) * dense.stride, dense);
  dense.first_input = first_input;
  if (first_input < layer.in) {
    dense.transposed_stride = matrix_stride(layer.in - first_input, kernels);
    arena.take(dense.transposed, layer.out * dense.transposed_stride);
  }
  return dense;
}

Dense take_one_row(Arena& arena, const TrainedLayer& layer, const Kernels& kernels) {
  Dense dense{};
  dense.one_row = true;
  dense.stride = matrix_stride(layer.in, kernels);
  take_parameters(arena, layer, dense.stride, dense);
  return dense;
}

void read_parameters(const TrainedLayer& layer, int64_t network, Dense& dense) {
  pair_up_all(layer, network, dense, [](float& theirs, float& ours) { ours = theirs; });
  if (dense.transposed == nullptr) return;
  for (int64_t k = dense.first_input; k < dense.in; ++k)
    for (int64_t n = 0; n < dense.out; ++n)
      dense.transposed[n * dense.transposed_stride + k - dense.first_input] =
          dense.value[k * dense.stride + n];
}

void write_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense) {
  pair_up_all(layer, network, dense, [](float& theirs, float& ours) { theirs = ours; });
}

AdamStep adam_step(float learning_rate, int64_t step, float weight_decay, float polyak) {
  const double correction1 = 1.0 - std::pow(kBeta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(kBeta2, static_cast<double>(step));
  return {static_cast<float>(learning_rate / correction1), static_cast<float>(1.0 / std::sqrt(correction2)),
          weight_decay, polyak};
}

void adam(const AdamStep& step, const Parameter& parameter, int64_t at, double gradient) {
  float &m = parameter.exp_avg[at], &v = parameter.exp_avg_sq[at];
  m = static_cast<float>(m + (gradient - m) * (1.0 - kBeta1));
  v = static_cast<float>(v * kBeta2 + gradient * gradient * (1.0 - kBeta2));
  parameter.value[at] -= static_cast<float>(step.size * m / (std::sqrt(v) * step.root_correction + kEpsilon));
}

}  // namespace mopo
