// The kernels for AMX: products of bfloat16 on matrix tiles; all else is as in avx512_bf16.cpp.
#include <immintrin.h>
#define MOPO_ISA avx512_amx
#define MOPO_NAME "avx512_amx"
#define MOPO_KERNELS kAvx512AmxKernels
#define MOPO_WIDTH 16
#define MOPO_BLOCK 8
#define MOPO_AVX512
#define MOPO_BFLOAT16
#define MOPO_AMX
#include "kernels.inl"
