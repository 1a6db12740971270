// The interface of training in CUDA: many steps of one run or of several in one launch. The caller has
// checked everything.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

#include "fit.h"
#include "sac.h"

namespace mopo::cuda {

// Returns `bytes` of device memory, which must stay allocated until the call has returned.
using Allocate = std::function<void*(size_t bytes)>;

// Makes the updates of all runs and waits for them. Adds their metrics to `metrics` [runs][kSacMetrics] on
// the device. All addresses in the arguments are the device's, except those of the arrays of TrainedLayer.
cudaError_t sac_updates(const std::vector<SacArgs>& runs, double* metrics, const Allocate& allocate,
                        cudaStream_t cuda_stream);

// Makes the fit steps of all runs and waits for them. Adds their losses to `losses` [runs] on the device.
cudaError_t fit_steps(const std::vector<FitArgs>& runs, double* losses, const Allocate& allocate,
                      cudaStream_t cuda_stream);

}  // namespace mopo::cuda
