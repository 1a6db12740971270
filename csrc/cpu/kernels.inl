// Every kernel, written once over the vector type. Each instruction set's file includes this after it has
// defined MOPO_ISA, MOPO_NAME, MOPO_KERNELS, MOPO_WIDTH (floats of a vector) and MOPO_BLOCK (outputs at a
// time).
//
// All of it lies in a namespace of the set's own: the linker merges inline functions of one name, and code
// compiled for one set must never run on a processor that lacks it.

#include <type_traits>
#include <utility>

#include "../philox.h"
#include "kernels.h"

namespace mopo {
namespace MOPO_ISA {

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#include "vec.h"
// clang-format off
#include "math.h"
#include "random.h"
#include "../spec.h"
#include "gemm.h"
#include "rollout.inl"
#include "values.inl"
#include "matmul.h"
#include "factors.h"
#include "train.inl"
#include "sac.inl"
#include "fit.inl"
#include "peak.inl"
// clang-format on

static void math(MathFunction function, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    vf in{};
    const int64_t lanes = smaller(W, count - i);
    for (int64_t lane = 0; lane < lanes; ++lane) in[lane] = x[i + lane];
    vf out{};
    switch (function) {
      case MathFunction::kExp:
        out = exp(in);
        break;
      case MathFunction::kLog:
        out = log(in);
        break;
      case MathFunction::kSinTurns:
        out = sincos_turns(in).sin;
        break;
      case MathFunction::kCosTurns:
        out = sincos_turns(in).cos;
        break;
      case MathFunction::kTanh:
        out = tanh(in);
        break;
      case MathFunction::kSilu:
        out = silu(in);
        break;
      case MathFunction::kSiluBFloat16:
        out = activate_factor<Precision::kBFloat16, Activation::kSilu>(in);
        break;
      case MathFunction::kSiluBFloat16x3:
        out = activate_factor<Precision::kBFloat16x3, Activation::kSilu>(in);
        break;
      case MathFunction::kReciprocal:
        out = reciprocal(in);
        break;
      case MathFunction::kSqrt:
        out = fast_sqrt(in);
        break;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) y[i + lane] = out[lane];
  }
}

}  // namespace MOPO_ISA

extern const Kernels MOPO_KERNELS = {
    MOPO_NAME,
    {MOPO_ISA::Float32::kPacking, MOPO_ISA::BFloat16::kPacking, MOPO_ISA::BFloat16x3::kPacking},
    MOPO_ISA::kBlock,
    MOPO_ISA::kPanel,
#ifdef MOPO_BFLOAT16
    MOPO_ISA::BFloat16Factors::kRows,
#else
    0,
#endif
    {MOPO_ISA::FirstLayer<MOPO_ISA::Float32Factors>::Factors::kPrecision,
     MOPO_ISA::FirstLayer<MOPO_ISA::BFloat16Factors>::Factors::kPrecision,
     MOPO_ISA::FirstLayer<MOPO_ISA::BFloat16x3Factors>::Factors::kPrecision},
    MOPO_ISA::rollout_chunk,
    MOPO_ISA::least_values,
    MOPO_ISA::sac_sample,
    MOPO_ISA::sac_target,
    MOPO_ISA::sac_critic,
    MOPO_ISA::sac_evaluate,
    MOPO_ISA::sac_action_gradient,
    MOPO_ISA::sac_actor,
    MOPO_ISA::sac_next,
    MOPO_ISA::make_factors,
    MOPO_ISA::move_target,
    MOPO_ISA::fit_rows,
    MOPO_ISA::fit_parameters,
    MOPO_ISA::float32_peak,
    MOPO_ISA::bfloat16_peak,
    MOPO_ISA::math,
};

}  // namespace mopo
