// A barrier between threads that have a core each and meet every few hundred microseconds: too often to
// sleep.
#pragma once

#include <atomic>
#include <cstdint>

namespace mopo {

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause();
    }
    // The others have lost their core to somebody: leave them this one.
    round_.wait(round, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 4000;  // 50 to 200 microseconds on x86

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace mopo
