// The machine's peak rate of arithmetic, measured by multiply-adds on registers.
#pragma once

#include "interrupt.h"
#include "kernels.h"

namespace mopo {

// Makes `rounds` rounds of multiply-adds on each thread, for the caller to time. Returns their FLOP.
double multiply_adds(const Kernels& kernels, bool bfloat16, int64_t rounds, int threads,
                     Interrupt& interrupt);

}  // namespace mopo
