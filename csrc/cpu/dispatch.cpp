#include "dispatch.h"

#include <stdexcept>

namespace mopo {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#ifdef MOPO_FAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16Kernels);
    found.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& kernels(const std::string& isa) {
  for (const Kernels* kernels : supported())
    if (isa.empty() || isa == kernels->name) return *kernels;
  throw std::invalid_argument("instruction set not supported here: " + isa);
}

}  // namespace mopo
