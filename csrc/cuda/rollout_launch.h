// The CUDA kernels' interface: device pointers and sizes. No torch, no Python; the caller has checked
// everything.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../rollout.h"

namespace mopo::cuda {

// What rollouts leave behind: [batch][horizon] rows, of which the first lengths[i] of rollout i exist.
struct DeviceRecord {
  float* actions;  // act_dim; read where there is no policy
  float* rewards;
  float* next_observations;  // obs_dim
  bool* terminals;
  float *raw_rewards, *penalties;
  int32_t* members;
  int32_t *lengths, *cut;  // [batch]; cut: 1 where a prediction that was not finite ended it
};

struct RolloutLaunch {
  // All weights in the order of their use (mopo_fast/backends/gpu/hopper_weights.py), and the chunks' sizes.
  const unsigned char* weights;
  const int32_t* chunk_bytes;
  int chunks;

  int obs_dim, act_dim, members;
  int hidden_layers;
  Activation activation;
  const float* input_mean;  // [obs_dim + act_dim]
  const float* input_std;
  const float* exp_minus_max;  // [members][obs_dim + 1], of the bounds
  const float* exp_min;
  const float* carry;  // [obs_dim], times the observation
  bool log_std;        // the bounds, and what they bound, are of standard deviations
  const int64_t* elites;
  int num_elites;
  const int64_t* penalty_members;
  int num_penalty_members;
  Penalty penalty;
  float penalty_coef;
  const float* low;  // [obs_dim], termination box
  const float* high;

  int policy_hidden_layers;  // 0: no policy, the record holds the actions
  Activation policy_activation;
  float log_std_min, log_std_max;

  int batch;
  const float* start;   // [batch][obs_dim]
  const int64_t* rows;  // [batch], numbers for the random counters
  int horizon;
  uint32_t first_step;
  uint64_t seed;
  bool deterministic;

  DeviceRecord record;
  float* mean;  // [members][batch][obs_dim + 1] or null, of the last step
  float* std;   // likewise

  float* scratch;  // [blocks][members][slots][2][256 threads][2]
  int blocks;      // even
};

// With products in float16 or bfloat16, of a class of sizes: every hidden layer of the dynamics is padded to
// `width`, 200 or 256; an observation and the reward together to 4 `slots`, 20 or 32 dimensions. At most 8
// dimensions of an action, and 256 of a hidden layer of the policy.
cudaError_t rollout_float16(const RolloutLaunch& args, int width, int slots, cudaStream_t cuda_stream);
cudaError_t rollout_bfloat16(const RolloutLaunch& args, int width, int slots, cudaStream_t cuda_stream);

// The ring that a record's rows are copied into; as in csrc/rollout.h, those after the terminals may be null.
struct CompactLaunch {
  int obs_dim, act_dim;
  int batch;
  int horizon;
  const float* start;
  const int64_t* rows;
  DeviceRecord record;
  const int64_t* offsets;  // [batch], rows of the rollouts before
  RolloutOutput out;
  int64_t capacity, head;
};

cudaError_t compact(const CompactLaunch& args, cudaStream_t cuda_stream);

}  // namespace mopo::cuda
