// Standard normals on the device.
#pragma once

#include "philox.h"

namespace mopo::cuda {

// Standard normal i, 0 to 3, of the four that a block gives by Box-Muller. cpu/random.h gives the same, to
// rounding.
MOPO_DEVICE float normal(const PhiloxBlock& block, int i) {
  const auto uniform = [](uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; };
  const float radius = sqrtf(-2.0f * logf(uniform(i < 2 ? block.word[0] : block.word[2])));
  float sine, cosine;
  sincospif(2.0f * uniform(i < 2 ? block.word[1] : block.word[3]), &sine, &cosine);
  return radius * (i % 2 == 0 ? cosine : sine);
}

}  // namespace mopo::cuda
