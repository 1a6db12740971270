// The kernels for AVX-512 F, BW, DQ, VL: 32 registers hold 8 x 3 sums, 3 vectors of rows and a weight. 8
// divides 200.
#include <immintrin.h>
#define MOPO_ISA avx512
#define MOPO_NAME "avx512"
#define MOPO_KERNELS kAvx512Kernels
#define MOPO_WIDTH 16
#define MOPO_BLOCK 8
#define MOPO_AVX512
#include "kernels.inl"
