// Any machine: four lanes, whatever the compiler's baseline makes of them.
#define MOPO_ISA portable
#define MOPO_NAME "portable"
#define MOPO_KERNELS kPortableKernels
#define MOPO_WIDTH 4
#define MOPO_BLOCK 4
#include "kernels.inl"
