// Barriers for threads that wait for one another every few hundred microseconds: they spin before they sleep.
#pragma once

#include <atomic>
#include <cstdint>

namespace mopo {

// Returns when `value` is no longer `old`.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  constexpr int kSpins = 4000;  // 50 to 200 microseconds on x86
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  // Another thread has probably lost its core: leave it this one.
  value.wait(old, std::memory_order_acquire);
}

// Lets `threads` threads pass together, again and again.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);  // sequentially consistent: before notify_all looks for sleepers
      round_.notify_all();
      return;
    }
    wait_while(round_, round);
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// A step number that only grows. One thread at a time announces it, any may wait for it.
class Milestone {
 public:
  void reach(int64_t step) {
    step_.store(step, std::memory_order_release);
    step_.notify_all();
  }
  void wait_for(int64_t step) const {
    for (int64_t now; (now = step_.load(std::memory_order_acquire)) < step;) wait_while(step_, now);
  }

 private:
  alignas(64) std::atomic<int64_t> step_{0};
};

}  // namespace mopo
