// The table of kernels that each instruction set's file fills, and the structs that it works on. The .cpp
// files of this folder allocate and share out the work; the .inl files, compiled once a set, do it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../fit.h"
#include "../rollout.h"
#include "../sac.h"
#include "../values.h"

namespace mopo {

class Barrier;
class Interrupt;

// Buffers for a layer's inputs and outputs are rounded up to this multiple: no kernel takes more at a time.
constexpr int64_t kWidthMultiple = 32;

// The layout of a rollout's factors, in words of 32 bits. Activations: [tiles][in / terms][parts][tile].
// Weights: [out / outputs][in / terms / words][parts][outputs][words]. Zeros fill up what is not a multiple.
struct Packing {
  int tile;     // rows of a tile
  int terms;    // consecutive inputs in a word: one float, or two bfloat16, the first in the lower half
  int outputs;  // outputs that a kernel takes at a time
  int words;    // consecutive words of one output's weights
  int parts;    // 2 where a factor is a sum: its value in bfloat16, and then the error of that
};

// The products of a pair of factors are numbered kFirstProduct to kLastProduct. Of two parts each these are
// low times high, high times high and high times low.
template <int kParts>
constexpr int kFirstProduct = 2 - kParts;
template <int kParts>
constexpr int kLastProduct = kParts;
constexpr int left_part(int number) { return number == 0 ? 1 : 0; }
constexpr int right_part(int number) { return number == 2 ? 1 : 0; }

// A network's packed weights, member after member. A layer's biases [out] follow its weights; offset[layer]
// counts words from the member's start to the layer.
struct PackedNetwork {
  const float* data;
  int64_t member_stride;
  const int64_t* offset;
};

// Read by all threads of a rollout.
struct RolloutPlan {
  PackedNetwork dynamics, policy;
  const float* inverse_std;    // [obs_dim + act_dim]
  const float* exp_minus_max;  // [members][obs_dim + 1]
  const float* exp_min;
  Interrupt* interrupt;
};

// True if only the member that a row has drawn computes it: nothing reads the other members' predictions.
inline bool computes_one_member(const RolloutArgs& args) {
  return !args.penalties && !args.deterministic && args.mean == nullptr;
}

// True if the call is to end. Defined in rollout.cpp, so that no instruction set's file has a copy of it.
bool interrupted(Interrupt& interrupt) noexcept;

// The transitions of a chunk, in arrays of the output's shapes: step t of rollout r is row r * horizon + t.
struct ChunkOutput {
  float *observations, *actions, *rewards, *next_observations;
  bool* terminals;
  float *raw_rewards, *penalties;  // penalties of no rows where RolloutArgs::penalties is false
  int32_t* members;
  int64_t* rollout_index;
  int32_t* step;
  int64_t* length;     // [chunk_rows], transitions of each rollout
  int64_t non_finite;  // rollouts cut because a prediction was not finite
  int64_t truncated;   // rollouts ended by their penalty
};

// Buffers between a network's layers for a tile of rows: a layer's inputs and its outputs, in turn; and the
// outputs before a layer norm, in floats. Networks without layer norms do not use the last one.
struct LayerBuffers {
  float *in, *out, *raw;
};

// A thread's memory for one chunk. The floats are in tiles, [tile][feature][rows of a tile]. Where only the
// drawn member computes a row, there is one tile with one member's predictions.
struct RolloutWorkspace {
  float *observations, *actions, *inputs, *predictions, *noise;
  LayerBuffers layers;
  int64_t *alive, *survivors;  // [chunk_rows], rollouts that go on: in this step, and in the next
  // Used if only the drawn member computes a row; see Chunk::group_by_member.
  uint32_t* drawn;     // [chunk_rows], the member that each row drew
  int64_t* group_end;  // [members + 1]
};

// Read by all threads that evaluate a policy at sampled states.
struct ValuesPlan {
  PackedNetwork policy, critics;
  Interrupt* interrupt;
};

// A thread's memory for a tile of such states, [feature][rows of a tile].
struct ValuesWorkspace {
  float *inputs, *noise, *outputs;  // obs_dim, act_dim; the larger of them; a network's outputs
  LayerBuffers layers;
};

// A row-major matrix whose rows are whole vectors.
struct Rows {
  float* data;
  int64_t stride;
  MOPO_METHOD float* at(int64_t row) const { return data + row * stride; }
};

// A matrix in panels of `Kernels::panel` columns, [panels][rows][columns of a panel]: a product passes
// through its factors and its result in the order of memory. `rows` is a multiple of `Kernels::block`.
struct Panels {
  float* data;
  int64_t rows;
};

// A matrix as a factor of products that sum over its columns (`along`) or over its rows (`across`). In
// float32 both are the matrix itself in panels, but for a weight's `along`, which is its transpose. In
// bfloat16, packed in pairs, they are two forms, [tiles][parts][rows][words], described in factors.h; a form
// that no product takes is null.
struct Factor {
  Panels along, across;
};

// A layer under training as the kernels keep it: matrices [in + 1][out] in panels of `rows` rows. The last of
// the in + 1 rows is the bias; padding is zero. A layer with one output has `rows` = 0 and arrays of in + 1
// numbers.
struct Dense {
  int64_t in, out, rows;
  float *value, *exp_avg, *exp_avg_sq, *target;
  // In float32 `across` is `value`. `along`, [out][in], is null where no gradient passes through the layer.
  Factor weight;
  Panels target_weight;  // the target's, as `weight.across`
};

// A layer norm under training: arrays of a number for each output, padded with zeros to whole panels.
struct NormArray {
  float *value, *exp_avg, *exp_avg_sq;
};
struct Norm {
  NormArray scale, shift;
};

// Threads that work on one network together; this one is number `part` of `parts`.
struct Team {
  int part, parts;
  Barrier* barrier;
  void wait() const noexcept;
};

// A critic of SAC that a team works on. From its forward pass to its step it has the memory of number `slot`,
// which no other team uses.
struct CriticTurn {
  int64_t critic, slot;
  Team team;
};

// Inputs of a network, and the factor that its first layer takes: in float32 the numbers themselves.
struct SacInputs {
  Panels numbers;
  Factor factor;
};

// The matrices of an update of SAC. hidden = depth - 1. A comment such as `obs_dim, act_dim, 1` lists
// columns; the 1 is the column of ones that the next layer's bias is multiplied by. The outputs of a hidden
// layer are a factor of the layer above, and of its precision.
struct SacPlan {
  int64_t rows;         // of every matrix: the batch, rounded up to whole blocks and tiles
  const Dense* actor;   // [depth]
  const Dense* critic;  // [critics][depth]
  float alpha;
  SacInputs observations, next_observations;     // obs_dim, 1
  SacInputs inputs, next_inputs, policy_inputs;  // obs_dim, act_dim, 1
  const Factor *actor_hidden, *actor_grad;       // [hidden]: outputs, and gradients before the activation
  const Factor* next_hidden;                     // [hidden]: outputs at the next observations
  Rows actor_head;                               // 2 act_dim
  Panels actor_head_grad;                        // likewise
  const Factor *critic_hidden, *critic_grad;     // [slots][hidden]
  const Factor* target_hidden;                   // [slots][hidden]: of the targets
  const Factor* policy_hidden;                   // [critics][hidden]: at the policy's actions
  const Factor* policy_grad;                     // [slots][hidden]: of the policy's loss
  Rows noise, spread, slopes, actions;           // act_dim; slopes are set if there is a log_prob_epsilon
  // obs_dim, act_dim; only the actions' columns are used. A matrix, or one for each critic with mean_actor.
  Rows action_grad;
  float *rewards, *discounts, *log_prob, *next_log_prob;  // [rows]; discounts are 0 after a terminal one
  float* policy_q_grad;          // [rows], -1 / batch: of the actor's loss by Q; 1 / critics of it by each
                                 // critic's with mean_actor
  float *q, *q_grad, *policy_q;  // [critics][rows]
  float* target_q;               // [target_critics][rows]
  float* targets;                // [critics][rows], the same for all
  int64_t *drawn, *picked;       // [rows], [critics][rows]
};

// Rows of a batch that a thread of SAC takes through a network at a time, as kFitWindow below. A batch of
// the usual size is one window: to pass through the weights again would take longer than it saves.
constexpr int64_t kSacWindow = 256;

// Shared by all members' steps of the fit.
struct FitPlan {
  const Dense* layers;                          // [members][depth]
  const Norm* norms;                            // [members][depth - 1]; null without layer norms
  float *max_logvar, *exp_minus_max, *exp_min;  // [dims]
  double *loss, *max_grad, *min_grad;           // [members], then twice [members][dims]: of the current step
};

// Rows of a batch that a thread of the fit takes through the network at a time, forwards and backwards: what
// passes between the layers then stays in the second-level cache, however large the batch.
constexpr int64_t kFitWindow = 128;

// A thread's memory for such rows. hidden = depth - 1. Comments list columns, as in SacPlan.
struct FitWindow {
  Rows head, targets;    // 2 dims, dims
  const Panels* slopes;  // [hidden], derivatives of the activation
  // With layer norms: [hidden], the normalised outputs before scale and shift; and for each row the factor
  // that normalised them.
  const Panels* normed;
  float* const* inverse_std;
  // Each layer norm uses these again: two sums of each row, kept as vectors while the layer's blocks pass,
  // and two means of each row.
  Rows sums[2];
  float* means[2];
  // Used where factors are packed. Layer by layer, the matrices `along` take turns with two buffers.
  Panels gathered, head_grad;  // in, 1 and 2 dims: floats that are packed next
  Panels left[2], grad[2];     // the widest layer
};

// A team's memory for one member's step: the factors of its weights' gradients, which are sums over the whole
// batch.
struct FitWorkspace {
  const FitWindow* windows;      // [threads of the team]
  Factor inputs;                 // in, 1
  const Factor *hidden, *grads;  // [hidden]
  Factor head_grad;              // 2 dims
  Rows max_grad, min_grad;       // dims: by the bounds of the log-variance
  float* loss;                   // [rows]
  // With layer norms: [hidden], gradients by the scale and by the shift, each row a sum over rows of the
  // batch that a thread takes at least.
  const Rows *scale_grads, *shift_grads;
};

// A member's step on rows begin .. begin + count of its pass, and the team that makes it.
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
  kSiluBFloat16,
  kSiluBFloat16x3,
  kReciprocal,
  kSqrt
};

// Size of the array that the loops of peak.inl work on.
constexpr int kPeakNumbers = 1024;

struct Kernels {
  const char* name;
  Packing packings[kPrecisions];
  int64_t block, panel;  // in training: rows of a block and columns of a panel
  int64_t tile;          // rows of a tile of packed bfloat16 factors; 0 where they are rounded floats
  // In SAC: of a network's first layer, where the hidden layers have this or that precision.
  Precision first_layer[kPrecisions];
  void (*rollout_chunk)(const RolloutArgs&, const RolloutPlan&, RolloutWorkspace&, ChunkOutput&,
                        int64_t first, int64_t rows);
  void (*least_values)(const ValuesArgs&, const ValuesPlan&, ValuesWorkspace&, int64_t first, int64_t last);
  // The parts of an update of SAC, which sac.cpp puts in order. The critics' parameters move in sac_critic,
  // or in sac_action_gradient with SacOrder::kSimultaneous.
  void (*sac_sample)(const SacArgs&, const SacPlan&, const Team&, int64_t update);
  // `place` is the critic's among those of the targets.
  void (*sac_target)(const SacArgs&, const SacPlan&, const CriticTurn&, int64_t place);
  void (*sac_critic)(const SacArgs&, const SacPlan&, const CriticTurn&, const AdamStep&);
  void (*sac_evaluate)(const SacArgs&, const SacPlan&, const CriticTurn&);  // Q of the policy's actions
  void (*sac_action_gradient)(const SacArgs&, const SacPlan&, const CriticTurn&, const AdamStep&);
  void (*sac_actor)(const SacArgs&, const SacPlan&, const Team&, const AdamStep&);
  // The part of sac_sample that draws actions at the next observations.
  void (*sac_next)(const SacArgs&, const SacPlan&, const Team&, int64_t update);
  // Makes a layer's weight factors from its values.
  void (*make_factors)(const Dense&, Precision);
  // Moves a layer's target towards its values, and makes the factors of both.
  void (*move_target)(const Dense&, Precision, float polyak);
  // A member's step of the fit: rows forwards and backwards, up to the loss and its gradient by the bounds;
  // then the parameters.
  void (*fit_rows)(const FitArgs&, const FitPlan&, const FitWorkspace&, const FitTurn&);
  void (*fit_parameters)(const FitArgs&, const FitPlan&, const FitWorkspace&, const FitTurn&,
                         const AdamStep* steps);
  // Multiply-adds to be timed, on numbers [kPeakNumbers]. Both return their FLOP.
  double (*float32_peak)(int64_t rounds, float* numbers);
  double (*bfloat16_peak)(int64_t rounds, float* numbers);
  // y = function(x), for the accuracy test.
  void (*math)(MathFunction, const float* x, float* y, int64_t count);
};

extern const Kernels kPortableKernels;
#ifdef MOPO_FAST_ARM
extern const Kernels kNeonKernels;
extern const Kernels kNeonBf16Kernels;
#endif
#ifdef MOPO_FAST_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512AmxKernels;
#endif

}  // namespace mopo
