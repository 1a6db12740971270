// The interface of the fit kernels: raw pointers and sizes. The caller has checked everything.
#pragma once

#include "common.h"
#include "train.h"

namespace mopo {

struct FitArgs {
  int64_t members, depth, dims;  // dims = obs_dim + 1; the last layer has 2 dims outputs
  const TrainedLayer* layers;    // [depth], `members` networks
  const TrainedNorm* norms;      // [depth - 1], of the hidden layers; null where there are none
  Activation activation;
  Parameter max_logvar, min_logvar;  // [dims], shared by the members

  const float* inputs;   // [..][in of the first layer], standardised
  const float* targets;  // [..][dims]
  int64_t stride;        // elements from one row to the next, in inputs and in targets
  const int32_t* rows;   // [members][rows_stride], the first `count`: a pass over each member's data
  int64_t count, rows_stride;
  int64_t batch;  // rows of each member in a step; the last step may have fewer

  float learning_rate, logvar_bound_weight;
  const float* weight_decay;  // [depth]
  int64_t steps_before;       // steps that Adam has made already
  Precision precision;
  int threads;
};

}  // namespace mopo
