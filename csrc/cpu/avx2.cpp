// The kernels for AVX2 with FMA: 16 registers hold 4 x 3 sums, 3 vectors of rows and a weight.
#define MOPO_ISA avx2
#define MOPO_NAME "avx2"
#define MOPO_KERNELS kAvx2Kernels
#define MOPO_WIDTH 8
#define MOPO_BLOCK 4
#include "kernels.inl"
