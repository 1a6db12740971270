// Macros, enumerations and the strided array that every kernel shares, on host and device.
#pragma once

#include <cstdint>

// MOPO_METHOD: inlined members for host and device. MOPO_DEVICE: inlined functions for the device alone.
#ifdef __CUDACC__
#define MOPO_METHOD __host__ __device__ __forceinline__
#define MOPO_DEVICE __device__ __forceinline__
#else
#define MOPO_METHOD inline __attribute__((always_inline))
#endif
// An inlined function. Internal linkage gives each instruction set's file its own copy: the linker must not
// choose one of them for all.
#define MOPO_INLINE static MOPO_METHOD

namespace mopo {

// In the order of mopo_fast/config.py, which passes them as integers.
enum class Activation : int { kSilu, kRelu, kTanh };

// Type of the factors of matrix products; sums are float. kBFloat16x3 takes a factor as the sum of two
// numbers in bfloat16, and adds three of the four products of these: the fourth is as small as the rounding.
enum class Precision : int { kFloat32, kBFloat16, kBFloat16x3 };
constexpr int kPrecisions = 3;

// The penalties that `penalise` in spec.h has, and their names in mopo_fast/config.py in the same order.
enum class Penalty : int { kMaxAleatoric, kMaxDeviation, kMaxPairwise, kEnsembleStd, kMixtureStd };
inline constexpr const char* kPenaltyNames[] = {"max_aleatoric", "max_deviation", "max_pairwise",
                                                "ensemble_std", "mixture_std"};

// Added to the variance of a layer norm, as PyTorch does by default; LAYER_NORM_EPSILON in
// mopo_fast/config.py.
constexpr float kLayerNormEpsilon = 1e-5f;

// Rows that begin `stride` elements apart: a contiguous array, or columns of a wider table.
template <class T>
struct Array {
  T* data;
  int64_t stride;
  MOPO_METHOD T* at(int64_t row) const { return data + row * stride; }
};

}  // namespace mopo
