// Asks the processor, and for AMX the system, which instruction sets there are.
#include "dispatch.h"

#include <stdexcept>
#if defined(MOPO_FAST_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mopo {
namespace {

#ifdef MOPO_FAST_X86
// True if the processor has AMX tiles of bfloat16 and Linux lets this process use them, for which it must
// ask.
bool has_amx() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
#ifdef MOPO_FAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) {
      if (has_amx()) found.push_back(&kAvx512AmxKernels);
      found.push_back(&kAvx512Bf16Kernels);
    }
    found.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> kernels = find();
  return kernels;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& kernels(const std::string& isa) {
  for (const Kernels* kernels : supported())
    if (isa == kernels->name) return *kernels;
  throw std::invalid_argument("instruction set not supported here: " + isa);
}

}  // namespace mopo
