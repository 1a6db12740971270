#include "rollout_sm90.cuh"

template cudaError_t mopo::cuda::rollout<__half>(const RolloutArgs&, int, int, cudaStream_t);
