#include "rollout_sm90.cuh"

template cudaError_t mopo::cuda::rollout<__nv_bfloat16>(const RolloutArgs&, int, int, cudaStream_t);
