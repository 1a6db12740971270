// The loops of peak.inl on several threads.
#include "peak.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "pool.h"

namespace mopo {

double multiply_adds(const Kernels& kernels, bool bfloat16, int64_t rounds, int threads,
                     Interrupt& interrupt) {
  const auto kernel = bfloat16 ? kernels.bfloat16_peak : kernels.float32_peak;
  std::vector<double> flop(threads);
  const auto work = [&](int thread) {
    alignas(64) float numbers[kPeakNumbers];
    std::fill_n(numbers, kPeakNumbers, 1.0f);
    flop[thread] = kernel(rounds, numbers);
  };
  parallel(threads, work, interrupt);
  return std::accumulate(flop.begin(), flop.end(), 0.0);
}

}  // namespace mopo
