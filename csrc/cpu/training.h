// Memory of the networks under training.
#pragma once

#include "../train.h"
#include "arena.h"
#include "kernels.h"

namespace mopo {

// The stride of a matrix of `width` columns: room for a column of ones and for whole blocks, and an odd
// number of cache lines, so that the rows of a column spread over the cache.
int64_t matrix_stride(int64_t width, const Kernels& kernels);

// Zeroed [rows][matrix_stride(width)].
Rows take_rows(Arena& arena, int64_t rows, int64_t width, const Kernels& kernels);

// A layer, its numbers still zero. first_input: of the weights that are kept transposed too; `in` for none.
Dense take_dense(Arena& arena, const TrainedLayer& layer, int64_t first_input, const Kernels& kernels);
// The last layer of a network with one output.
Dense take_one_row(Arena& arena, const TrainedLayer& layer, const Kernels& kernels);

// Between the caller's arrays of network number `network` and the kernels'.
void read_parameters(const TrainedLayer& layer, int64_t network, Dense& dense);
void write_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense);

AdamStep adam_step(float learning_rate, int64_t step, float weight_decay, float polyak);

// Number `at` of a parameter a step against its gradient.
void adam(const AdamStep& step, const Parameter& parameter, int64_t at, double gradient);

}  // namespace mopo
