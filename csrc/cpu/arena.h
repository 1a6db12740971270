// One aligned allocation from which a call takes all its arrays.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace mopo {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Hands out aligned pieces of one allocation. A caller takes all pieces twice, in the same order: first the
// arena only adds up their sizes, and after allocate() it sets the pointers.
class Arena {
 public:
  template <class T>
  void take(T*& pointer, int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    pointer = memory_ ? reinterpret_cast<T*>(memory_.get() + used_) : nullptr;
    used_ += bytes;
  }

  void allocate() {
    const bool large = used_ >= 2 * kLargePage;
    const size_t alignment = large ? kLargePage : kAlignment;
    const size_t bytes = (used_ + alignment) / alignment * alignment;
    memory_.reset(static_cast<char*>(std::aligned_alloc(alignment, bytes)));
    if (!memory_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Large pages: a matrix read down its columns takes fewer address translations.
    if (large) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    used_ = 0;
  }

  void allocate_zeroed() {
    const size_t bytes = used_;
    allocate();
    std::memset(memory_.get(), 0, bytes);
  }

 private:
  static constexpr size_t kAlignment = 64, kLargePage = size_t{2} << 20;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t used_ = 0;
};

}  // namespace mopo
