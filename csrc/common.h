// Words that every kernel shares, on host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOPO_METHOD __host__ __device__ __forceinline__
#define MOPO_DEVICE __device__ __forceinline__
#else
#define MOPO_METHOD inline __attribute__((always_inline))
#endif
// Internal linkage: each instruction set's file has its own copy, and the linker may not choose among them.
#define MOPO_INLINE static MOPO_METHOD

namespace mopo {

// The order is that of mopo_fast/config.py.
enum class Activation : int { kSilu, kRelu, kTanh };
enum class Penalty : int { kMaxAleatoric, kMaxDeviation, kMaxPairwise, kEnsembleStd, kMixtureStd };

// An array, its rows `stride` elements apart: of its own, or columns of a table.
template <class T>
struct Array {
  T* data;
  int64_t stride;
  MOPO_METHOD T* at(int64_t row) const { return data + row * stride; }
};

}  // namespace mopo
