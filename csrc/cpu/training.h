// Memory of the networks under training, and who works on which.
#pragma once

#include "../train.h"
#include "arena.h"
#include "kernels.h"

namespace mopo {

// Room for whole vectors.
Rows take_rows(Arena& arena, int64_t rows, int64_t width);
// Room for a column of ones and for whole blocks.
Panels take_panels(Arena& arena, int64_t rows, int64_t width, const Kernels& kernels);

// X or G of factors.h, [rows][width], X with its column of ones.
enum class Side { kLeft, kGrad };
Factor take_factor(Arena& arena, int64_t rows, int64_t width, Side side, bool bfloat16,
                   const Kernels& kernels);

// A layer, its numbers still zero; `backwards`: gradients go back through it.
Dense take_dense(Arena& arena, const TrainedLayer& layer, bool backwards, bool bfloat16,
                 const Kernels& kernels);
// The last layer of a network with one output.
Dense take_one_row(Arena& arena, const TrainedLayer& layer, const Kernels& kernels);

// Between the caller's arrays of network number `network` and the kernels'.
void read_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense, bool bfloat16,
                     const Kernels& kernels);
void write_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense, const Kernels& kernels);

// Number `at` of a parameter a step against its gradient.
void adam(const AdamStep& step, const Parameter& parameter, int64_t at, double gradient);

}  // namespace mopo
