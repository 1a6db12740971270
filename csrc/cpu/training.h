// Memory of networks under training, and their parameters between the caller's layout and the kernels'.
#pragma once

#include "../train.h"
#include "arena.h"
#include "kernels.h"

namespace mopo {

// Rows of a batch that a thread takes at least.
int64_t granule(Precision precision, const Kernels& kernels);

// [rows][width], each row rounded up to whole vectors.
Rows take_rows(Arena& arena, int64_t rows, int64_t width);
// [rows][width + 1] in panels, rounded up to whole blocks: the last column is for ones.
Panels take_panels(Arena& arena, int64_t rows, int64_t width, const Kernels& kernels);

// A factor [rows][width] of factors.h: kLeft is X, with its column of ones, kGrad is G.
enum class Side { kLeft, kGrad };
Factor take_factor(Arena& arena, int64_t rows, int64_t width, Side side, Precision precision,
                   const Kernels& kernels);
// True if factors are packed in tiles, so that `along` and `across` are two arrays. Then one of
// them can be taken alone; `take_along` serves both sides.
bool in_tiles(Precision precision, const Kernels& kernels);
Panels take_along(Arena& arena, int64_t rows, int64_t width, Precision precision, const Kernels& kernels);
Panels take_across(Arena& arena, int64_t rows, int64_t width, Side side, Precision precision,
                   const Kernels& kernels);

// A layer whose numbers are still zero. `backwards`: gradients pass through it, so it needs weight.along.
Dense take_dense(Arena& arena, const TrainedLayer& layer, bool backwards, Precision precision,
                 const Kernels& kernels);
// The last layer of a network that has one output.
Dense take_one_row(Arena& arena, const TrainedLayer& layer, const Kernels& kernels);

// Copy network number `network` from the caller's arrays, and back.
void read_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense, Precision precision,
                     const Kernels& kernels);
// Returns true if all numbers are finite.
bool write_parameters(const TrainedLayer& layer, int64_t network, const Dense& dense, const Kernels& kernels);

// One step of Adam, in double, on number `at` of a parameter.
void adam(const AdamStep& step, const Parameter& parameter, int64_t at, double gradient);

}  // namespace mopo
