// The early end of a kernel's call by a signal, for which only the thread that calls can look.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

namespace mopo {

class Interrupt {
 public:
  // asked() is called by the thread that made the object, every 50 ms at most. If it returns true, the call
  // ends.
  explicit Interrupt(std::function<bool()> asked)
      : asked_(std::move(asked)), owner_(std::this_thread::get_id()) {}

  // True if the call is to end. Any thread may ask, at any rate; once true, it stays true.
  bool requested() {
    if (std::this_thread::get_id() == owner_ && !requested_.load(std::memory_order_relaxed)) {
      const auto now = std::chrono::steady_clock::now();
      if (now >= next_) {
        next_ = now + kInterval;
        if (asked_()) requested_.store(true, std::memory_order_relaxed);
      }
    }
    return requested_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr std::chrono::milliseconds kInterval{50};
  const std::function<bool()> asked_;
  const std::thread::id owner_;
  std::atomic<bool> requested_{false};
  std::chrono::steady_clock::time_point next_{std::chrono::steady_clock::now() + kInterval};
};

}  // namespace mopo
