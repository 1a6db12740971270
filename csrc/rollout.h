// The interface of the rollout kernels: raw pointers and sizes, no torch, no Python. The caller has checked
// everything.
#pragma once

#include <cstdint>

#include "common.h"

namespace mopo {

struct NetworkLayer {
  const float* weight;  // [networks][in][out]
  const float* bias;    // [networks][out]
  int64_t in, out;
  // [networks][out]: of the layer norm between the layer and its activation. Null where there is none.
  const float *norm_scale, *norm_shift;
};

// `networks` multi-layer perceptrons of one shape; the last layer is linear.
struct Network {
  const NetworkLayer* layers;
  int64_t depth;     // number of layers
  int64_t networks;  // members of an ensemble; 1 for a policy
  Activation activation;
};

// Arrays of `capacity` rows, written as a ring. The arrays after `terminals` may be null.
struct RolloutOutput {
  Array<float> observations;  // obs_dim
  Array<float> actions;       // act_dim
  Array<float> rewards;
  Array<float> next_observations;  // obs_dim
  Array<bool> terminals;
  Array<float> raw_rewards, penalties;
  Array<int32_t> members;
  Array<int64_t> rollout_index;
  Array<int32_t> step;
};

// A rollout ends after a step whose penalty is larger than `at`, which is infinite where none ends so. With
// `halts` such a step is terminal, and its reward is `reward`.
struct Truncation {
  float at;
  bool halts;
  float reward;
};

struct RolloutArgs {
  int64_t obs_dim, act_dim;

  // Dynamics: in = obs_dim + act_dim, out = 2 (obs_dim + 1): means of (delta obs, reward), then
  // log-variances, or logarithms of standard deviations where log_std is true.
  Network dynamics;
  const float* input_mean;  // [obs_dim + act_dim]
  const float* input_std;
  const float* max_logvar;  // [members][obs_dim + 1]
  const float* min_logvar;
  // [obs_dim]: next observation = carry * observation + sample. 1 where the network predicts a change, 0
  // where it predicts the next observation itself.
  const float* carry;
  bool log_std;
  const int64_t* elites;
  int64_t num_elites;
  const int64_t* penalty_members;
  int64_t num_penalty_members;
  Penalty penalty;
  float penalty_coef;
  // Compute penalties: needed where penalty_coef is not 0, truncate_at is finite or the output has penalties.
  bool penalties;
  Truncation truncation;
  bool keep_member;  // a rollout draws one member for all its steps
  const float* low;  // [obs_dim]; a rollout terminates outside of low .. high
  const float* high;

  // Policy: in = obs_dim, out = 2 act_dim: means, then log stds. With depth 0 the actions are `actions`.
  Network policy;
  float log_std_min, log_std_max;
  const float* actions;  // [batch][act_dim] or null

  int64_t batch;
  const float* start;   // [batch][obs_dim]
  const int64_t* rows;  // [batch], the rollouts' numbers in the random counters
  int64_t horizon;
  uint32_t first_step;
  uint64_t seed;
  bool mean_actions;   // actions without noise
  bool deterministic;  // the mean of all members' means, without noise
  Precision precision;

  // Keep one row for each start state, non-finite ones too: for RolloutEngine.step.
  bool keep_every_row;
  RolloutOutput out;
  int64_t capacity, head;
  float* mean;  // [members][batch][obs_dim + 1] or null
  float* std;   // likewise

  int threads;
};

struct RolloutCounts {
  int64_t written;     // rows
  int64_t non_finite;  // rollouts cut because a prediction was not finite
  int64_t truncated;   // rollouts ended by their penalty
};

}  // namespace mopo
