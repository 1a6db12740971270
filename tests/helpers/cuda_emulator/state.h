// The state of the emulated machine while a cluster runs, and how its parts wait and fail.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"
#include "schedule.h"

namespace mopo::emulator {

// First address of shared memory in its window, so that address 0 lies outside.
constexpr uint32_t kSharedWindow = 1024;
// Bytes of shared memory that a Hopper block may have at most. Writes beyond the requested size are found.
constexpr int kSharedBytes = 232448;

struct Block;
struct Cluster;
struct Thread;

// A vector clock: the events that a thread knows of, by itself or from threads that it has waited for. It
// counts the finished products of each warpgroup and the phases of each barrier. With it, an order that holds
// by luck alone is found under any schedule.
struct Clock {
  void learn(const Clock& other) {
    for (size_t i = 0; i < other.counts.size(); ++i) learn(i, other.counts[i]);
  }
  void learn(size_t what, uint64_t count) {
    if (what >= counts.size()) counts.resize(what + 1);
    counts[what] = std::max(counts[what], count);
  }
  uint64_t of(size_t what) const { return what < counts.size() ? counts[what] : 0; }
  std::vector<uint64_t> counts;
};

// Something that threads wait for. A woken thread checks again if it still has to wait.
struct Waitable {
  virtual ~Waitable() = default;
  virtual std::string describe(const Thread& who) const = 0;
  void wake();
  // All expected threads have arrived; passes on their clocks.
  void complete() {
    told = gathered;
    wake();
  }
  std::vector<Thread*> waiting;
  Clock gathered, told;
};

// A point that threads pass together: a warp's collectives, __syncthreads, cluster_sync.
struct Meeting : Waitable {
  std::string describe(const Thread&) const override;
  void meet(const char* what, int members);
  // Expects fewer threads, since one has ended.
  void expect(int members);
  const char* what = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
};

struct BarrierState : Waitable {
  std::string describe(const Thread& who) const override;
  void arrive();
  void count_bytes(int64_t change);
  void advance();
  Block* block;
  uint32_t offset;
  size_t number;  // index in Clock::counts
  uint32_t count, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;
  const Thread* initialised_by;
  // Its thread has called fence_barrier_init; then begun cluster_sync; then cluster_sync has ended.
  bool fenced = false, announced = false, published = false;
};

struct NamedBarrier : Waitable {
  std::string describe(const Thread&) const override;
  void arrive(int threads, Thread& who);
  int id = 0, expected = 0;
  uint64_t generation = 0;
  std::vector<const Thread*> arrived;
};

// The wait for a counter in global memory, one for all counters.
struct Arrivals : Waitable {
  std::string describe(const Thread& who) const override;
};

struct RegisterPool : Waitable {
  std::string describe(const Thread& who) const override;
  int free = 0;
};

struct Warp {
  Meeting meeting;
  int lanes = 0;
  // Two shuffles in turn, since a lane may be one ahead of another.
  float exchange[2][32];
};

// A warpgroup's d while products add to it, and the addresses of its threads' registers.
struct Accumulator {
  int columns;
  std::vector<float> value;
  std::array<float*, 128> home{};
};

struct Product {
  Operands type;
  uint64_t matrix;
  std::shared_ptr<Accumulator> d;
  std::array<std::array<uint32_t, 4>, 128> a;
  // The barriers that the bulk copies of b were counted at, with the number of phases after which they had
  // landed.
  std::vector<std::pair<const BarrierState*, uint64_t>> landings;
  int issued = 0;
};

struct Warpgroup : Waitable {
  std::string describe(const Thread& who) const override;
  bool can_execute() const;
  void execute();
  Block* block;
  int index;
  size_t number;  // index in Clock::counts
  // Products that no thread has waited for, numbered from `first` on; `executed` counts all products.
  std::deque<Product> products;
  int64_t first = 0, executed = 0;
  // Number of products before the end of each group.
  std::vector<int64_t> group_ends;
};

struct Flight {
  std::shared_ptr<Accumulator> d;
  float* home;
  int64_t last;
};

struct Thread {
  Thread(Block* block, int number, const std::function<void()>& kernel);
  std::string name() const;
  Fiber fiber;
  Block* block;
  Warp* warp;
  Warpgroup* warpgroup;
  // `number` in the cluster, `index` in the block.
  int number, index;
  bool done = false;
  Waitable* waits_for = nullptr;
  uint32_t waits_parity = 0, waits_count = 0;
  int registers = 0;
  Clock clock;
  uint64_t shuffles = 0;
  // products_begin has been called for the next product; pack() has been called since; products issued,
  // groups, and accumulators in flight.
  bool begun = false, packed = false;
  int64_t issued = 0, groups = 0;
  std::vector<Flight> flights;
};

struct alignas(1024) SharedMemory {
  unsigned char bytes[kSharedBytes];
};

// 16 bytes of shared memory: the state of the last bulk copy onto them, and each warpgroup's number of
// products up to the last that reads them.
struct Unit {
  enum { kNothing, kOnItsWay, kLanded } copy = kNothing;
  const BarrierState* barrier;
  uint64_t phase;
  std::array<uint64_t, 8> products{};
};

struct Block {
  Block(Cluster* cluster, int rank, int index, int threads, int shared);
  unsigned char* at(uint32_t offset) { return memory->bytes + offset; }
  const unsigned char* at(uint32_t offset) const { return memory->bytes + offset; }
  Cluster* cluster;
  int rank, index, threads, shared;
  int alive;
  // The memory that threads see, and the bytes that bulk copies have brought.
  std::unique_ptr<SharedMemory> memory, copied;
  std::vector<Unit> units;
  Meeting syncthreads;
  std::array<NamedBarrier, 16> named;
  RegisterPool registers;
  std::deque<Warp> warps;
  std::deque<Warpgroup> warpgroups;
};

// A part of a bulk copy that is on its way to one block.
struct Piece {
  Block* block;
  uint32_t offset, bytes;
  const unsigned char* source;
  BarrierState* barrier;
};

struct Cluster {
  Cluster(const std::function<void()>& kernel, int first, int size, int threads, int shared, uint64_t seed);
  void run();
  void happen();
  bool anything_pending() const;
  [[noreturn]] void deadlock() const;
  Schedule schedule;
  std::deque<Block> blocks;
  std::deque<Thread> threads;
  std::deque<Thread*> ready;
  std::deque<BarrierState> barriers;
  std::vector<Piece> pieces;
  Meeting sync;
  Arrivals arrivals;
  int alive;
  std::string error;
};

// The running thread; null while the scheduler runs.
extern Thread* self;

// Ends the launch with this text and the running thread's name.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...);
// Stops the thread until `what` wakes it.
void wait_for(Waitable& what);
// Lets the scheduler run other threads here.
void pause();
// Offset of a pointer in the block's shared memory; fails unless `bytes` from there on lie in it.
uint32_t offset_of(const void* pointer, uint32_t bytes);
// The barrier at an offset; fails unless the thread may use it.
BarrierState& barrier_of(Block& block, uint32_t offset);
void land(const Piece& piece);

}  // namespace mopo::emulator
