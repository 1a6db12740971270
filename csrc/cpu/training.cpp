// The layouts of training.h.
#include "training.h"

#include <algorithm>
#include <bit>

#include "../scalar.h"
#include "barrier.h"

namespace mopo {
namespace {

// Position of an element of a matrix in panels.
int64_t offset(int64_t rows, int64_t row, int64_t column, int64_t panel) {
  return (column / panel * rows + row) * panel + column % panel;
}

// Calls copy(theirs, ours, count) for each stretch of weights and biases that is contiguous in the caller's
// array and in the kernels'.
template <class Copy>
void pair_up(const TrainedLayer& layer, int64_t network, const Dense& dense, int64_t panel,
             float* Parameter::* theirs, float* ours, Copy copy) {
  float* weight = layer.weight.*theirs + network * layer.in * layer.out;
  float* bias = layer.bias.*theirs + network * layer.out;
  if (dense.rows == 0) {
    copy(weight, ours, layer.in);
    copy(bias, ours + layer.in, 1);
    return;
  }
  for (int64_t k = 0; k <= layer.in; ++k) {
    float* row = k < layer.in ? weight + k * layer.out : bias;
    for (int64_t n = 0; n < layer.out; n += panel)
      copy(row + n, ours + offset(dense.rows, k, n, panel), std::min(panel, layer.out - n));
  }
}

template <class Copy>
void pair_up_all(const TrainedLayer& layer, int64_t network, const Dense& dense, const Kernels& kernels,
                 Copy copy) {
  const auto pair = [&](float* Parameter::* theirs, float* ours) {
    if (ours != nullptr) pair_up(layer, network, dense, kernels.panel, theirs, ours, copy);
  };
  pair(&Parameter::value, dense.value);
  pair(&Parameter::exp_avg, dense.exp_avg);
  pair(&Parameter::exp_avg_sq, dense.exp_avg_sq);
  pair(&Parameter::target, dense.target);
}

void take_parameters(Arena& arena, const TrainedLayer& layer, int64_t size, Dense& dense) {
  dense.in = layer.in;
  dense.out = layer.out;
  arena.take(dense.value, size);
  arena.take(dense.exp_avg, size);
  arena.take(dense.exp_avg_sq, size);
  if (layer.weight.target != nullptr) arena.take(dense.target, size);
}

// One form of a factor in tiles, two numbers a word; consecutive tiles, or their parts, lie `rows` times 16
// words apart.
Panels take_words(Arena& arena, int64_t rows, int64_t others, Precision precision) {
  const int64_t parts = precision == Precision::kBFloat16x3 ? 2 : 1;
  Panels result{nullptr, rows};
  arena.take(result.data, parts * rows * others / 2);
  return result;
}

}  // namespace

void Team::wait() const noexcept {
  if (parts > 1) barrier->wait();
}

int64_t granule(Precision precision, const Kernels& kernels) {
  return in_tiles(precision, kernels) ? kernels.tile : kernels.block;
}

Rows take_rows(Arena& arena, int64_t rows, int64_t width) {
  constexpr int64_t kLine = 16;
  Rows result{nullptr, round_up(width, kLine)};
  arena.take(result.data, rows * result.stride);
  return result;
}

Panels take_panels(Arena& arena, int64_t rows, int64_t width, const Kernels& kernels) {
  Panels result{nullptr, round_up(rows, kernels.block)};
  arena.take(result.data, result.rows * round_up(width + 1, kernels.panel));
  return result;
}

bool in_tiles(Precision precision, const Kernels& kernels) {
  return precision != Precision::kFloat32 && kernels.tile > 0;
}

Panels take_along(Arena& arena, int64_t rows, int64_t width, Precision precision, const Kernels& kernels) {
  return take_words(arena, round_up(rows, kernels.tile), round_up(width + 1, kernels.tile), precision);
}

Panels take_across(Arena& arena, int64_t rows, int64_t width, Side side, Precision precision,
                   const Kernels& kernels) {
  const int64_t height = round_up(rows, kernels.tile), breadth = round_up(width + 1, kernels.tile);
  return side == Side::kLeft ? take_words(arena, breadth, height, precision)
                             : take_words(arena, height, breadth, precision);
}

Factor take_factor(Arena& arena, int64_t rows, int64_t width, Side side, Precision precision,
                   const Kernels& kernels) {
  if (in_tiles(precision, kernels))
    return {take_along(arena, rows, width, precision, kernels),
            take_across(arena, rows, width, side, precision, kernels)};
  const Panels itself = take_panels(arena, rows, width, kernels);
  return {itself, itself};
}

Dense take_dense(Arena& arena, const TrainedLayer& layer, bool backwards, Precision precision,
                 const Kernels& kernels) {
  Dense dense{};
  dense.rows = round_up(layer.in + 1, kernels.block);
  const int64_t size = dense.rows * round_up(layer.out, kernels.panel);
  take_parameters(arena, layer, size, dense);
  if (in_tiles(precision, kernels)) {
    const int64_t height = round_up(layer.in + 1, kernels.tile), breadth = round_up(layer.out, kernels.tile);
    dense.weight.across = take_words(arena, height, breadth, precision);
    if (backwards) dense.weight.along = take_words(arena, breadth, height, precision);
    if (layer.weight.target != nullptr) dense.target_weight = take_words(arena, height, breadth, precision);
    return dense;
  }
  dense.weight.across = {dense.value, dense.rows};
  dense.target_weight = {dense.target, dense.rows};
  if (precision != Precision::kFloat32) {
    arena.take(dense.weight.across.data, size);
    if (layer.weight.target != nullptr) arena.take(dense.target_weight.data, size);
  }
  // Whole panels of rows, since a block of parameters is stored with its padding.
  if (backwards)
    dense.weight.along = take_panels(arena, round_up(layer.out, kernels.panel), layer.in, kernels);
  return dense;
}

Dense take_one_row(Arena& arena, const TrainedLayer& layer, const Kernels& kernels) {
  Dense dense{};
  take_parameters(arena, layer, round_up(layer.in + 1, kernels.panel), dense);
  return dense;
}

void read_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense, Precision precision,
                     const Kernels& kernels) {
  pair_up_all(layer, network, dense, kernels,
              [](const float* theirs, float* ours, int64_t n) { std::copy_n(theirs, n, ours); });
  if (dense.rows > 0) kernels.make_factors(dense, precision);
}

bool write_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense,
                      const Kernels& kernels) {
  uint32_t signs = 0;
  pair_up_all(layer, network, dense, kernels, [&](float* theirs, const float* ours, int64_t n) {
    std::copy_n(ours, n, theirs);
    // The sum's sign bit is set if all bits of the exponent are.
    for (int64_t i = 0; i < n; ++i) signs |= (std::bit_cast<uint32_t>(ours[i]) & 0x7fffffff) + 0x00800000;
  });
  return signs >> 31 == 0;
}

void adam(const AdamStep& step, const Parameter& parameter, int64_t at, double gradient) {
  adam<double>(step, gradient, parameter.value[at], parameter.exp_avg[at], parameter.exp_avg_sq[at]);
}

}  // namespace mopo
