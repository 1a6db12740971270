// Training in CUDA: many steps of one run or of several in one launch. The caller has checked everything.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

#include "fit.h"
#include "sac.h"

namespace mopo::cuda {

// Gives `bytes` of the device's memory; they must stay until the call has returned.
using Allocate = std::function<void*(size_t bytes)>;

// The updates of each run, done when it returns; adds their metrics to `metrics` [runs][kSacMetrics] on the
// device. All addresses in the arguments are the device's, those of their layers' arrays excepted.
cudaError_t sac_updates(const std::vector<SacArgs>& runs, double* metrics, const Allocate& allocate,
                        cudaStream_t cuda_stream);

// The steps of each run; adds their losses to `losses` [runs], likewise.
cudaError_t fit_steps(const std::vector<FitArgs>& runs, double* losses, const Allocate& allocate,
                      cudaStream_t cuda_stream);

}  // namespace mopo::cuda
