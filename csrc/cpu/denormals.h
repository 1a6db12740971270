// Denormal numbers are zeros while a thread trains.
#pragma once

#include <cstdint>

namespace mopo {

// Treats denormal numbers as zero on this thread for the lifetime of the object. Where a unit of ReLU has
// died, Adam's moments shrink until they are denormal, and stay so, since 0.9 of the least is rounded up to
// itself. A processor may take more than a hundred cycles for an operation on them. On processors other than
// x86 and ARM, they stay as they are.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) {
    constexpr unsigned kResultsAreZero = 1u << 15, kOperandsAreZero = 1u << 6;
    __builtin_ia32_ldmxcsr(before_ | kResultsAreZero | kOperandsAreZero);
  }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }
#elif defined(__aarch64__)
  FlushDenormals() {
    constexpr uint64_t kFlushToZero = 1u << 24;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_)::"memory");
    set(before_ | kFlushToZero);
  }
  ~FlushDenormals() { set(before_); }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  const unsigned before_;
#elif defined(__aarch64__)
  static void set(uint64_t control) { __asm__ volatile("msr fpcr, %0" ::"r"(control) : "memory"); }
  uint64_t before_;
#endif
};

}  // namespace mopo
