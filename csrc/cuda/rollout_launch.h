// The interface of the CUDA rollout: device pointers and sizes, no torch, no Python. The caller has checked
// everything.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../rollout.h"

namespace mopo::cuda {

// The rollouts' output before compact(): [batch][horizon] rows, of which the first lengths[i] of rollout i
// exist.
struct DeviceRecord {
  float* actions;  // act_dim; an input where there is no policy
  float* rewards;
  float* next_observations;  // obs_dim
  bool* terminals;
  float *raw_rewards, *penalties;
  int32_t* members;
  int32_t *lengths, *cut;  // [batch]; cut is 1 where a non-finite prediction ended the rollout, 2 where its
                           // penalty did
};

struct RolloutLaunch {
  // All weights in the order of their use, cut into chunks by mopo_fast/backends/gpu/hopper_weights.py.
  const unsigned char* weights;
  const int32_t* chunk_bytes;
  int chunks;

  int obs_dim, act_dim, members;
  int hidden_layers;
  Activation activation;
  const float* input_mean;  // [obs_dim + act_dim]
  const float* input_std;
  const float* exp_minus_max;  // [members][obs_dim + 1], exp(-max_logvar)
  const float* exp_min;        // likewise, exp(min_logvar)
  const float* carry;          // [obs_dim]: next observation = carry * observation + sample
  bool log_std;                // the last layer and its bounds are log stds, not log-variances
  const int64_t* elites;
  int num_elites;
  const int64_t* penalty_members;
  int num_penalty_members;
  Penalty penalty;
  float penalty_coef;
  Truncation truncation;
  bool keep_member;  // a rollout draws one member for all its steps
  const float* low;  // [obs_dim]; a rollout terminates outside of low .. high
  const float* high;

  int policy_hidden_layers;  // 0 for no policy: the actions are in the record
  Activation policy_activation;
  float log_std_min, log_std_max;

  int batch;
  const float* start;   // [batch][obs_dim]
  const int64_t* rows;  // [batch], the rollouts' numbers in the random counters
  int horizon;
  uint32_t first_step;
  uint64_t seed;
  bool mean_actions;   // actions without noise
  bool deterministic;  // the mean of all members' means, without noise

  DeviceRecord record;
  float* mean;  // [members][batch][obs_dim + 1] or null, of the last step
  float* std;   // likewise

  float* scratch;  // [blocks][members][slots][2][256 threads][2]
  int blocks;      // even
};

// Starts the rollout with products in float16 or bfloat16, in one of four size classes: the dynamics' hidden
// layers are padded to `width`, 200 or 256; observation and reward together to 4 `slots`, 20 or 32
// dimensions. An action has at most 8 dimensions, the policy's hidden layers at most 256.
cudaError_t rollout_float16(const RolloutLaunch& args, int width, int slots, cudaStream_t cuda_stream);
cudaError_t rollout_bfloat16(const RolloutLaunch& args, int width, int slots, cudaStream_t cuda_stream);

// A record and the ring that its rows are copied into. As in csrc/rollout.h, arrays after `terminals` may be
// null.
struct CompactLaunch {
  int obs_dim, act_dim;
  int batch;
  int horizon;
  const float* start;
  const int64_t* rows;
  DeviceRecord record;
  const int64_t* offsets;  // [batch], the number of rows of all rollouts before
  RolloutOutput out;
  int64_t capacity, head;
};

cudaError_t compact(const CompactLaunch& args, cudaStream_t cuda_stream);

}  // namespace mopo::cuda
