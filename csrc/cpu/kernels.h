// What each instruction set's file gives to dispatch.cpp, and what it gets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../rollout.h"

namespace mopo {

// A network's weights for the micro-kernel: per member and layer [padded(out) / block][in][block], then its
// biases [padded(out)]. offset[layer] counts floats from the member's start.
struct PackedNetwork {
  const float* data;
  int64_t member_stride;
  const int64_t* offset;
};

// Sizes that a rollout's threads share. A chunk is the rows that one thread takes through all steps.
struct RolloutPlan {
  int64_t chunk_rows;  // a multiple of the tile
  PackedNetwork dynamics, policy;
  const float* inverse_std;    // [obs_dim + act_dim]
  const float* exp_minus_max;  // [obs_dim + 1]
  const float* exp_min;
};

// A chunk's memory. Records are row-major, rollout r's step t at row r * horizon + t; the rest is tiles,
// [tile][feature][rows of a tile].
struct RolloutWorkspace {
  float *observations, *actions, *inputs, *predictions, *noise, *layer_in, *layer_out;
  int64_t *alive, *survivors;  // [chunk_rows], rollouts of the chunk that go on
  uint32_t* drawn;             // [tile]
  RolloutOutput record;
  int64_t* length;     // [chunk_rows], steps that each rollout has
  int64_t non_finite;  // rollouts cut
};

enum class MathFunction : int { kExp, kLog, kSinTurns, kCosTurns, kTanh, kSilu };

struct Kernels {
  const char* name;
  int64_t tile, block;
  void (*rollout_chunk)(const RolloutArgs&, const RolloutPlan&, RolloutWorkspace&, int64_t first,
                        int64_t rows);
  void (*math)(MathFunction, const float* x, float* y, int64_t count);
};

extern const Kernels kPortableKernels;
#ifdef MOPO_FAST_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace mopo
