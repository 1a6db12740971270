// Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), for host and device.
// A value depends on (seed, row, step, stream, block) and on nothing else. backends/philox.py is the same
// function.
#pragma once

#include <cstdint>

#include "common.h"

namespace mopo {

// The purpose of a draw, in the upper half of the counter's last word. The lower half numbers the blocks of
// four words that one purpose takes.
enum PhiloxStream : uint32_t {
  kActionStream = 0,      // the policy's noise
  kNoiseStream = 1,       // the dynamics' noise
  kMemberStream = 2,      // the elite member of a step
  kBatchStream = 3,       // the transition that a row of a SAC batch is
  kNextActionStream = 4,  // the policy's noise at next observations, in SAC's target
  kCriticStream = 5       // the critics of SAC's targets
};

struct PhiloxBlock {
  uint32_t word[4];
};

MOPO_INLINE PhiloxBlock philox4x32(PhiloxBlock counter, uint64_t key) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Block number `block` of a stream. `row` is a rollout's number, or a row of a SAC batch; `step` the step of
// the rollout, or the number of the update.
MOPO_INLINE PhiloxBlock random_block(int64_t row, uint32_t step, PhiloxStream stream, uint32_t block,
                                     uint64_t seed) {
  const uint64_t number = static_cast<uint64_t>(row);
  return philox4x32(
      {{static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), step, (stream << 16) | block}},
      seed);
}

// Uniform in [0, choices) from one word, by the high half of a product: the bias is choices / 2^32 at most.
MOPO_INLINE uint32_t choose(uint32_t word, uint32_t choices) {
  return static_cast<uint32_t>((static_cast<uint64_t>(word) * choices) >> 32);
}

}  // namespace mopo
