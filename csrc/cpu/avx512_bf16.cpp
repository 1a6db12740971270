// The kernels for AVX-512 BF16: products of pairs of bfloat16; all else is as in avx512.cpp.
#include <immintrin.h>
#define MOPO_ISA avx512_bf16
#define MOPO_NAME "avx512_bf16"
#define MOPO_KERNELS kAvx512Bf16Kernels
#define MOPO_WIDTH 16
#define MOPO_BLOCK 8
#define MOPO_AVX512
#define MOPO_BFLOAT16
#include "kernels.inl"
