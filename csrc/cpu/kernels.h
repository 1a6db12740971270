// What each instruction set's file gives to dispatch.cpp, and what it gets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../fit.h"
#include "../rollout.h"
#include "../sac.h"

namespace mopo {

// A network's weights for the micro-kernel: per member and layer [padded(out) / block][words(in)][block], a
// word being a float or two bfloat16 of consecutive inputs; then its biases [padded(out)]. offset[layer]
// counts words from the member's start.
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

// A row-major matrix; rows and stride leave room for whole blocks.
struct Rows {
  float* data;
  int64_t stride;
  MOPO_METHOD float* at(int64_t row) const { return data + row * stride; }
};

// A layer under training as the kernels keep it: [in + 1][stride], the bias last, zeros beyond `out`; or,
// with one output, as a row of in + 1 numbers.
struct Dense {
  bool one_row;
  int64_t in, out, stride;
  float *value, *exp_avg, *exp_avg_sq, *target;
  float*
      transposed;  // [out][transposed_stride], the weights of inputs first_input .. in; null where not needed
  int64_t first_input, transposed_stride;
};

// One step of Adam: -size * m / (sqrt(v) * root_correction + epsilon).
struct AdamStep {
  float size, root_correction, weight_decay, polyak;
};

// What an update of SAC is computed in; a thread has its rows of every matrix. hidden = depth - 1.
struct SacPlan {
  int64_t rows;         // of every matrix: the batch, rounded up to whole blocks
  const Dense* actor;   // [depth]
  const Dense* critic;  // [critics][depth]
  float alpha;
  Rows observations, next_observations;     // obs_dim, 1
  Rows inputs, next_inputs, policy_inputs;  // obs_dim, act_dim, 1
  const Rows *actor_hidden, *actor_grad;    // [hidden]
  Rows actor_head, actor_head_grad;         // 2 act_dim
  const Rows *critic_hidden, *critic_grad;  // [critics][hidden]
  const Rows* scratch_hidden;               // [critics][hidden]
  Rows scratch_grad[2];
  Rows noise, spread, actions, action_grad;         // act_dim
  float *rewards, *continues, *log_prob, *targets;  // [rows]
  float* minus_share;                               // [rows], - 1 / batch
  float *q, *q_grad, *policy_q;                     // [critics][rows]
  int64_t *least, *picked;                          // [rows]
};

// What a step of the fit is computed in, one member at a time. hidden = depth - 1.
struct FitPlan {
  int64_t rows;                                 // of every matrix: the batch, rounded up to whole blocks
  const Dense* layers;                          // [members][depth]
  Rows inputs;                                  // in, 1
  const Rows *hidden, *slopes, *grads;          // [hidden]; slopes: the activation's derivative
  Rows head, head_grad;                         // 2 dims
  Rows targets, max_grad, min_grad;             // dims; gradients by the bounds of the log-variance
  float* loss;                                  // [rows]
  float *max_logvar, *exp_minus_max, *exp_min;  // [dims]
};

enum class MathFunction : int { kExp, kLog, kSinTurns, kCosTurns, kTanh, kSilu };

struct Kernels {
  const char* name;
  int64_t tile, block;  // of the rollout
  int64_t rows;         // of a block in training
  void (*rollout_chunk)(const RolloutArgs&, const RolloutPlan&, RolloutWorkspace&, int64_t first,
                        int64_t rows);
  // Rows first .. last of one update, up to the gradients of the networks' outputs and hidden layers.
  void (*sac_critic_rows)(const SacArgs&, const SacPlan&, int64_t update, int64_t first, int64_t last);
  void (*sac_actor_rows)(const SacArgs&, const SacPlan&, int64_t update, int64_t first, int64_t last);
  // The parameters' gradients and their step, the share of thread `part` of `parts`.
  void (*sac_train_critics)(const SacArgs&, const SacPlan&, const AdamStep&, int64_t part, int64_t parts);
  void (*sac_train_actor)(const SacArgs&, const SacPlan&, const AdamStep&, int64_t part, int64_t parts);
  // Rows first .. last of a member's step, up to the gradients of its layers' outputs; then its parameters.
  void (*fit_rows)(const FitArgs&, const FitPlan&, int64_t member, int64_t begin, int64_t count,
                   int64_t first, int64_t last);
  void (*fit_train)(const FitArgs&, const FitPlan&, int64_t member, int64_t count, const AdamStep* steps,
                    int64_t part, int64_t parts);
  void (*math)(MathFunction, const float* x, float* y, int64_t count);
};

extern const Kernels kPortableKernels;
#ifdef MOPO_FAST_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace mopo
