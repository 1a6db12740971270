#include "cuda/rollout_sm90.cuh"

namespace mopo::cuda {

cudaError_t rollout_bfloat16(const RolloutArgs& args, int width, int slots, cudaStream_t stream) {
  return launch<__nv_bfloat16>(args, width, slots, stream);
}

}  // namespace mopo::cuda
