// Aligned memory for the kernels.
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

// Asks for large pages where [p, p + bytes) holds whole ones: what is read here and there, or down the
// columns of a matrix, then has its address translations at hand. To be called before the memory is touched.
inline void use_large_pages(char* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Hands out aligned pieces of one allocation. Sizes are asked for twice: first to add them up, then for
// real.
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
    if (large) use_large_pages(memory_.get(), bytes);
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
