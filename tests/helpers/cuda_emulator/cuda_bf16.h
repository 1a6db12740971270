// Stands for CUDA's header of bfloat16, whose bits are the upper half of a float.
#pragma once

#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};
