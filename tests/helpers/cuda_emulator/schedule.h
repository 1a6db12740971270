// All random decisions of the emulator, from one seed: the next thread, and the times of asynchronous work.
#pragma once

#include <cstdint>
#include <random>

namespace mopo::emulator {

class Schedule {
 public:
  // Seed 0: threads in turn, and asynchronous work only when no thread can run.
  explicit Schedule(uint64_t seed) : engine_(seed) {
    if (seed == 0) return;
    constexpr double kHaste[] = {0.0, 0.02, 0.3, 1.0};
    order_ = static_cast<Order>(1 + below(3));
    haste_ = kHaste[below(4)];
    pause_ = kHaste[below(3)];
    redraw();
  }

  uint32_t below(uint32_t count) { return std::uniform_int_distribution<uint32_t>(0, count - 1)(engine_); }
  bool chance(double probability) {
    return probability > 0.0 && std::uniform_real_distribution<>()(engine_) < probability;
  }

  // True if asynchronous work is done before the next thread runs.
  bool hasty() { return chance(haste_); }
  // True if a thread stops although it does not have to.
  bool pauses() { return chance(pause_); }

  // Index of the next thread among those that can run; `ready[i]->number` is a thread's number in the
  // cluster.
  template <class Ready>
  size_t pick(const Ready& ready) {
    if (order_ == kInTurn) return 0;
    if (order_ == kRandom) return below(static_cast<uint32_t>(ready.size()));
    // Some warps or warpgroups always run before others, which starve; their ranks change now and then.
    if (chance(1e-3)) redraw();
    const int threads = order_ == kWarps ? 32 : 128;
    size_t best = below(static_cast<uint32_t>(ready.size()));
    // The best of kTrials random ones.
    for (int trial = 1; trial < kTrials; ++trial) {
      const size_t other = below(static_cast<uint32_t>(ready.size()));
      if (rank(ready[other]->number / threads) > rank(ready[best]->number / threads)) best = other;
    }
    return best;
  }

 private:
  enum Order { kInTurn, kRandom, kWarps, kWarpgroups };

  void redraw() {
    for (uint32_t& rank : ranks_) rank = static_cast<uint32_t>(engine_());
  }
  uint32_t rank(int unit) const { return ranks_[unit % kRanks]; }

  static constexpr int kRanks = 256, kTrials = 16;
  std::mt19937_64 engine_;
  Order order_ = kInTurn;
  double haste_ = 0.0, pause_ = 0.0;
  uint32_t ranks_[kRanks] = {};
};

}  // namespace mopo::emulator
