// Fibers: functions on stacks of their own, which run when resumed and stop when they suspend themselves.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <new>
#include <utility>
#include <vector>

namespace mopo::emulator {

class Fiber {
 public:
  // `body` must not return: it ends with a suspend().
  explicit Fiber(std::function<void()> body) : body_(std::move(body)), stack_(take_stack()) {}
  Fiber(const Fiber&) = delete;
  ~Fiber() { unused().push_back(stack_); }

  // Called by the scheduler alone.
  void resume() {
    if (__builtin_setjmp(outside()) == 0) enter();
  }

  // Called by the fiber itself.
  void suspend() {
    if (__builtin_setjmp(inside_) == 0) leave();
  }

 private:
  static constexpr size_t kStack = 256 * 1024, kGuard = 4096;

  // The compiler's own setjmp and longjmp: libc's, and the sanitizers' in their place, inspect the stack. A
  // longjmp must not be in the function of its setjmp.
  using Place = void* [5];

  __attribute__((noinline)) void leave() { __builtin_longjmp(outside(), 1); }
  __attribute__((noinline)) void enter() {
    if (started_) __builtin_longjmp(inside_, 1);
    started_ = true;
    starting() = this;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, [] { starting()->body_(); }, 0);
    setcontext(&context);
  }

  // Stacks are kept for later fibers. Below each lies a guard page.
  static std::vector<void*>& unused() {
    static std::vector<void*> stacks;
    return stacks;
  }
  static void* take_stack() {
    if (!unused().empty()) {
      void* stack = unused().back();
      unused().pop_back();
      return stack;
    }
    void* stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, kGuard, PROT_NONE);
    return stack;
  }

  static Place& outside() {
    static Place place;
    return place;
  }
  static Fiber*& starting() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  std::function<void()> body_;
  void* stack_;
  Place inside_;
  bool started_ = false;
};

}  // namespace mopo::emulator
