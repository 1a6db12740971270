// The kernels for NEON with products of bfloat16: rollouts multiply 2 x 4 by 4 x 2 numbers at a time; all
// else is as in neon.cpp. BFMMLA takes denormal numbers for zero.
#include <arm_neon.h>
#define MOPO_ISA neon_bf16
#define MOPO_NAME "neon_bf16"
#define MOPO_KERNELS kNeonBf16Kernels
#define MOPO_WIDTH 4
#define MOPO_BLOCK 8
#define MOPO_BFMMLA
#include "kernels.inl"
