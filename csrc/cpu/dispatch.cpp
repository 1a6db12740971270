// Asks the processor, and for AMX the system, which instruction sets there are.
#include "dispatch.h"

#include <stdexcept>
#ifdef MOPO_FAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#ifdef MOPO_FAST_ARM
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace mopo {
namespace {

#ifdef MOPO_FAST_X86
// The registers after the instruction cpuid; zeros if the processor lacks the leaf.
struct Leaf {
  Leaf(unsigned number, unsigned part) { __get_cpuid_count(number, part, &a, &b, &c, &d); }
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// The processor's features that the system lets programs use. They are read by cpuid, because
// __builtin_cpu_supports always answers no in a library that Zig has linked.
class Processor {
 public:
  Processor() {
    constexpr unsigned kXgetbv = 27;
    unsigned high;
    if (has(basic_.c, kXgetbv)) __asm__("xgetbv" : "=a"(saved_), "=d"(high) : "c"(0));
  }

  bool avx2() const {
    constexpr unsigned kFma = 12, kAvx = 28, kAvx2 = 5;
    return saves(0x6) && has(basic_.c, kFma) && has(basic_.c, kAvx) && has(extended_.b, kAvx2);
  }
  bool avx512() const {
    constexpr unsigned kF = 16, kDq = 17, kBw = 30, kVl = 31;
    return avx2() && saves(0xe6) && has(extended_.b, kF) && has(extended_.b, kDq) && has(extended_.b, kBw) &&
           has(extended_.b, kVl);
  }
  bool avx512_bf16() const {
    constexpr unsigned kBf16 = 5;
    return avx512() && has(more_.a, kBf16);
  }
  // Linux lets a process use the tiles once it has asked.
  bool avx512_amx() const {
#ifdef __linux__
    constexpr unsigned kBf16 = 22, kTile = 24;
    if (!avx512_bf16() || !has(extended_.d, kBf16) || !has(extended_.d, kTile)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }

 private:
  static bool has(unsigned bits, unsigned bit) { return (bits >> bit & 1) != 0; }
  // True if the system saves these registers (bits of XCR0) between its programs.
  bool saves(unsigned registers) const { return (saved_ & registers) == registers; }

  const Leaf basic_{1, 0}, extended_{7, 0}, more_{7, 1};
  unsigned saved_ = 0;
};
#endif

#ifdef MOPO_FAST_ARM
// True if the processor has BFMMLA, the matrix product of bfloat16.
bool multiplies_bfloat16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 14;
  return (getauxval(AT_HWCAP2) >> kBf16 & 1) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
#ifdef MOPO_FAST_X86
  const Processor processor;
  if (processor.avx512_amx()) found.push_back(&kAvx512AmxKernels);
  if (processor.avx512_bf16()) found.push_back(&kAvx512Bf16Kernels);
  if (processor.avx512()) found.push_back(&kAvx512Kernels);
  if (processor.avx2()) found.push_back(&kAvx2Kernels);
#endif
#ifdef MOPO_FAST_ARM
  if (multiplies_bfloat16()) found.push_back(&kNeonBf16Kernels);
  found.push_back(&kNeonKernels);
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
