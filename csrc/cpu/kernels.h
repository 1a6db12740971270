// What each instruction set's file gives to dispatch.cpp, and what it gets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../fit.h"
#include "../rollout.h"
#include "../sac.h"

namespace mopo {

class Barrier;
class Interrupt;

// What a layer's buffers are rounded up to: outputs, and inputs, that any kernel takes at a time.
constexpr int64_t kRoom = 32;

// How a rollout's factors are packed: rows in tiles; words of `terms` consecutive inputs, a float or two
// bfloat16; weights [out / outputs][in / terms / words][outputs][words], zeros filling up.
struct Packing {
  int tile, terms, outputs, words;
};

// A network's packed weights, member after member; after each layer's its biases [out]. offset[layer] counts
// words from the member's start.
struct PackedNetwork {
  const float* data;
  int64_t member_stride;
  const int64_t* offset;
};

// What a rollout's threads share.
struct RolloutPlan {
  PackedNetwork dynamics, policy;
  const float* inverse_std;    // [obs_dim + act_dim]
  const float* exp_minus_max;  // [members][obs_dim + 1]
  const float* exp_min;
  Interrupt* interrupt;
};

// True if the call is to end. It lies in rollout.cpp, so that no instruction set's file has a copy.
bool interrupted(const RolloutPlan& plan) noexcept;

// What a chunk's steps made, arrays of the output's shapes, rollout r's step t at row r * horizon + t.
struct ChunkOutput {
  float *observations, *actions, *rewards, *next_observations;
  bool* terminals;
  float *raw_rewards, *penalties;
  int32_t* members;
  int64_t* rollout_index;
  int32_t* step;
  int64_t* length;     // [chunk_rows], steps that each rollout has
  int64_t non_finite;  // rollouts cut
};

// The memory that a thread makes a chunk in: tiles, [tile][feature][rows of a tile].
struct RolloutWorkspace {
  float *observations, *actions, *inputs, *predictions, *noise, *layer_in, *layer_out;
  int64_t *alive, *survivors;  // [chunk_rows], rollouts of the chunk that go on
  uint32_t* drawn;             // [tile]
};

// A row-major matrix of whole vectors.
struct Rows {
  float* data;
  int64_t stride;
  MOPO_METHOD float* at(int64_t row) const { return data + row * stride; }
};

// A matrix in panels of `Kernels::panel` columns, [panel][rows][columns of the panel]: a product passes
// through its factors and its result in the order of memory. `rows` are whole blocks.
struct Panels {
  float* data;
  int64_t rows;
};

// A matrix as a factor of products that sum over its columns (`along`) or over its rows (`across`). In
// float32 and on most instruction sets `across`, and `along` of all but weights, are the matrix itself in
// panels; with tiles of bfloat16 they are what factors.h says, [tiles][rows][words].
struct Factor {
  Panels along, across;
};

// A layer under training as the kernels keep it: matrices [in + 1][out] in panels of `rows` rows, the bias
// last, zeros beyond; or, with one output, arrays of in + 1 numbers.
struct Dense {
  int64_t in, out, rows;
  float *value, *exp_avg, *exp_avg_sq, *target;
  Factor weight;  // in float32 `across` is `value`; `along`, [out][in], null where not needed
};

// Threads that work on one network together: part of parts.
struct Team {
  int part, parts;
  Barrier* barrier;
  void wait() const noexcept;
};

// What an update of SAC is computed in. hidden = depth - 1.
struct SacPlan {
  int64_t rows;         // of every matrix: the batch, rounded up to whole blocks
  const Dense* actor;   // [depth]
  const Dense* critic;  // [critics][depth]
  float alpha;
  Panels observations, next_observations;     // obs_dim, 1
  Panels inputs, next_inputs, policy_inputs;  // obs_dim, act_dim, 1
  const Panels *actor_hidden, *actor_grad;    // [hidden]
  Rows actor_head;                            // 2 act_dim
  Panels actor_head_grad;                     // likewise
  const Panels *critic_hidden, *critic_grad;  // [critics][hidden]
  const Panels* scratch_hidden;  // [critics][hidden], of the targets, then of the policy's actions
  const Panels* scratch_grad;    // [critics][2]
  Rows noise, spread, actions;   // act_dim
  Rows action_grad;              // obs_dim, act_dim; the actions' columns count
  float *rewards, *continues, *log_prob, *next_log_prob;  // [rows]
  float* minus_share;                                     // [rows], - 1 / batch
  float *q, *q_grad, *target_q, *policy_q;                // [critics][rows]
  float* targets;                                         // [critics][rows], the same for all
  int64_t *drawn, *picked;                                // [rows], [critics][rows]
};

// What the members' steps of the fit share.
struct FitPlan {
  const Dense* layers;                          // [members][depth]
  float *max_logvar, *exp_minus_max, *exp_min;  // [dims]
  double *loss, *max_grad, *min_grad;           // [members], [members][dims]: of the step
};

// What one member's step is computed in. hidden = depth - 1.
struct FitWorkspace {
  Panels gathered;                   // in, 1: what `inputs` are made of, and in float32 are
  Factor inputs;                     // likewise
  const Factor *hidden, *grads;      // [hidden]
  const Panels* slopes;              // [hidden], the activation's derivative
  Rows head;                         // 2 dims
  Panels head_floats;                // likewise: what `head_grad` is made of, and in float32 is
  Factor head_grad;                  // likewise
  Rows targets, max_grad, min_grad;  // dims; gradients by the bounds of the log-variance
  float* loss;                       // [rows]
};

// A member's step on rows begin .. begin + count of its pass, and who makes it.
struct FitTurn {
  int64_t member, begin, count;
  Team team;
};

enum class MathFunction : int {
  kExp,
  kLog,
  kSinTurns,
  kCosTurns,
  kTanh,
  kSilu,
  kRoughSilu,
  kReciprocal,
  kSqrt
};

// Room that the peak's loops need.
constexpr int kPeakNumbers = 1024;

struct Kernels {
  const char* name;
  Packing float32, bfloat16;
  int64_t block, panel;  // in training: rows of a block and columns of a panel
  int64_t tile;          // side of the square that bfloat16 training takes at a time; 0: panels, as float32
  void (*rollout_chunk)(const RolloutArgs&, const RolloutPlan&, RolloutWorkspace&, ChunkOutput&,
                        int64_t first, int64_t rows);
  // An update of SAC in its order; every thread has done one before any begins the next. Where the critics'
  // step comes first, sac_critic does it; else sac_action_gradient.
  void (*sac_sample)(const SacArgs&, const SacPlan&, const Team&, int64_t update);
  void (*sac_target)(const SacArgs&, const SacPlan&, const Team&, int64_t critic);
  void (*sac_critic)(const SacArgs&, const SacPlan&, const Team&, int64_t critic, const AdamStep&);
  void (*sac_action_gradient)(const SacArgs&, const SacPlan&, const Team&, int64_t critic, const AdamStep&);
  void (*sac_actor)(const SacArgs&, const SacPlan&, const Team&, const AdamStep&);
  // A layer's weights as factors, from its values.
  void (*take_up)(const Dense&, bool bfloat16);
  // A member's step: up to the loss and its gradient by the bounds; then the parameters.
  void (*fit_forward)(const FitArgs&, const FitPlan&, const FitWorkspace&, const FitTurn&);
  void (*fit_backward)(const FitArgs&, const FitPlan&, const FitWorkspace&, const FitTurn&,
                       const AdamStep* steps);
  // Multiply-adds for nothing but their time, on numbers [kPeakNumbers]; gives their FLOP.
  double (*float32_peak)(int64_t rounds, float* numbers);
  double (*bfloat16_peak)(int64_t rounds, float* numbers);
  void (*math)(MathFunction, const float* x, float* y, int64_t count);
};

extern const Kernels kPortableKernels;
#ifdef MOPO_FAST_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512AmxKernels;
#endif

}  // namespace mopo
