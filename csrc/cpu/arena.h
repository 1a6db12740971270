// One aligned allocation from which a call takes all its arrays. A thread keeps the largest block that it has
// freed for its next calls: mapping and clearing pages would take as long as an update of SAC.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace mopo {

struct FreeBlock {
  void operator()(char* p) const { std::free(p); }
};

// Memory of `bytes` bytes. `layout` tells in numbers how its last user has laid it out; empty if that user
// has promised nothing, see Arena::allocate_zeroed.
struct Block {
  std::unique_ptr<char, FreeBlock> memory;
  size_t bytes = 0;
  std::vector<int64_t> layout;

  // The block that this thread keeps.
  static Block& spare() {
    static thread_local Block block;
    return block;
  }
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Hands out aligned pieces of one allocation. A caller takes all pieces twice, in the same order: first the
// arena only adds up their sizes, and after allocate() it sets the pointers.
class Arena {
 public:
  Arena() = default;
  Arena(Arena&&) = default;
  ~Arena() {
    Block& spare = Block::spare();
    // An arena that was moved has no memory.
    if (block_.memory && block_.bytes > spare.bytes && block_.bytes <= kMostSpare) std::swap(block_, spare);
  }

  template <class T>
  void take(T*& pointer, int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    char* memory = block_.memory.get();
    pointer = memory != nullptr ? reinterpret_cast<T*>(memory + used_) : nullptr;
    used_ += bytes;
  }

  void allocate() {
    obtain(true);
    block_.layout.clear();
  }

  // allocate() of zeros. A block that was remembered with the same layout is not cleared again.
  void allocate_zeroed(const std::vector<int64_t>& layout = {}) {
    const size_t bytes = used_;
    // Without a layout the memory may be kept for long, so it must not be larger than needed.
    obtain(!layout.empty());
    if (layout.empty() || block_.layout != layout) std::memset(block_.memory.get(), 0, bytes);
    block_.layout.clear();
  }

  // Promises that the block still has zeros wherever a caller that gives the same layout, so that it takes
  // pieces of the same sizes, needs them.
  void remember(std::vector<int64_t> layout) { block_.layout = std::move(layout); }

 private:
  static constexpr size_t kAlignment = 64, kLargePage = size_t{2} << 20;
  // Limits of the block that a thread keeps: its size, and how many times too large it may be for a call.
  static constexpr size_t kMostSpare = size_t{128} << 20, kMostWaste = 8;

  void obtain(bool from_spare) {
    const bool large = used_ >= 2 * kLargePage;
    const size_t alignment = large ? kLargePage : kAlignment;
    const size_t bytes = (used_ + alignment) / alignment * alignment;
    used_ = 0;
    Block& spare = Block::spare();
    if (from_spare && spare.bytes >= bytes && spare.bytes / kMostWaste <= bytes) {
      block_ = std::exchange(spare, {});
      return;
    }
    block_ = {};
    block_.memory.reset(static_cast<char*>(std::aligned_alloc(alignment, bytes)));
    block_.bytes = bytes;
    if (!block_.memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Large pages: a matrix read down its columns takes fewer address translations.
    if (large) madvise(block_.memory.get(), bytes, MADV_HUGEPAGE);
#endif
  }

  Block block_;
  size_t used_ = 0;
};

}  // namespace mopo
