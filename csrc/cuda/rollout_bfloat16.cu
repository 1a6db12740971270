// The rollout on Hopper with products in bfloat16.
#include "cuda/rollout_sm90.cuh"

namespace mopo::cuda {

cudaError_t rollout_bfloat16(const RolloutLaunch& args, int width, int slots, cudaStream_t cuda_stream) {
  return launch<__nv_bfloat16>(args, width, slots, cuda_stream);
}

}  // namespace mopo::cuda
