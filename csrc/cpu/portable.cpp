// The kernels for any machine: four lanes, compiled for the baseline of the compiler.
#define MOPO_ISA portable
#define MOPO_NAME "portable"
#define MOPO_KERNELS kPortableKernels
#define MOPO_WIDTH 4
#define MOPO_BLOCK 4
#include "kernels.inl"
