// The kernels for NEON, which every 64-bit ARM processor has: 32 registers hold 8 x 3 sums of a rollout, 3
// vectors of rows and a weight. In training, 8 x 2 sums.
#define MOPO_ISA neon
#define MOPO_NAME "neon"
#define MOPO_KERNELS kNeonKernels
#define MOPO_WIDTH 4
#define MOPO_BLOCK 8
#include "kernels.inl"
