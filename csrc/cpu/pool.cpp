// The pools of threads behind parallel().
#include "pool.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace mopo {
namespace {

class Pool {
 public:
  void run(int count, const std::function<void(int)>& body, Interrupt& interrupt) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) + 1 < count) {
        const int index = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, index, seen = round_] { work(index, seen); });
      }
      body_ = &body;
      count_ = count;
      running_ = count - 1;
      ++round_;
    }
    start_.notify_all();
    body(0);
    std::unique_lock<std::mutex> lock(mutex_);
    while (!done_.wait_for(lock, kLook, [this] { return running_ == 0; })) {
      lock.unlock();
      interrupt.requested();
      lock.lock();
    }
  }

 private:
  static constexpr std::chrono::milliseconds kLook{20};

  void work(int index, long seen) {
    for (;;) {
      const std::function<void(int)>* body;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (index >= count_) continue;
        body = body_;
      }
      (*body)(index);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* body_ = nullptr;
  int count_ = 0, running_ = 0;
  long round_ = 0;
};

// The idle pools. Each call takes one, so that calls from several threads run side by side. A forked child
// has none of its parent's threads, so it starts pools of its own. Pools are never destroyed: their threads
// may outlive static objects.
class Pools {
 public:
  Pool* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (owner_ != getpid()) {
      free_.clear();
      owner_ = getpid();
    }
    if (free_.empty()) return new Pool;
    Pool* pool = free_.back();
    free_.pop_back();
    return pool;
  }

  void give_back(Pool* pool) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(pool);
  }

 private:
  std::mutex mutex_;
  std::vector<Pool*> free_;
  pid_t owner_ = 0;
};

}  // namespace

void parallel(int count, const std::function<void(int)>& body, Interrupt& interrupt) {
  if (count <= 1) {
    body(0);
  } else {
    static Pools* const pools = new Pools;
    Pool* pool = pools->take();
    pool->run(count, body, interrupt);
    pools->give_back(pool);
  }
}

}  // namespace mopo
