// The scheduler, the launches, and the single instructions.
#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mopo::emulator {
namespace {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string last_error;

std::string format_text(const char* format, va_list arguments) {
  char buffer[1000];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}

void thread_main(Thread& thread, const std::function<void()>& kernel) {
  kernel();
  if (!thread.flights.empty()) fail("it ends with products that it has not waited for");
  thread.done = true;
  Block& block = *thread.block;
  block.syncthreads.expect(--block.alive);
  block.cluster->sync.expect(--block.cluster->alive);
  for (const Piece& piece : block.cluster->pieces)
    if (block.alive == 0 && piece.block == &block)
      fail("its block ends while a bulk copy into its shared memory is on its way");
  thread.fiber.suspend();
}

}  // namespace

Thread* self = nullptr;

std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = format_text(format, arguments);
  va_end(arguments);
  return result;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string error = format_text(format, arguments);
  va_end(arguments);
  if (self == nullptr) throw Failure(error);
  self->block->cluster->error = self->name() + ": " + error;
  for (;;) self->fiber.suspend();
}

void wait_for(Waitable& what) {
  what.waiting.push_back(self);
  self->waits_for = &what;
  self->fiber.suspend();
}

void Waitable::wake() {
  for (Thread* thread : waiting) {
    thread->waits_for = nullptr;
    thread->block->cluster->ready.push_back(thread);
  }
  waiting.clear();
}

void pause() {
  Cluster& cluster = *self->block->cluster;
  if (!cluster.schedule.pauses()) return;
  cluster.ready.push_back(self);
  self->fiber.suspend();
}

Thread::Thread(Block* block, int index, const std::function<void()>& kernel)
    : fiber([this, &kernel] { thread_main(*this, kernel); }),
      block(block),
      warp(&block->warps[index / 32]),
      warpgroup(&block->warpgroups[index / 128]),
      number(block->rank * block->threads + index),
      index(index) {
  ++warp->lanes;
}

std::string Thread::name() const {
  return text("block %d, thread %d (warp %d)", block->index, index, index / 32);
}

Block::Block(Cluster* cluster, int rank, int index, int threads, int shared)
    : cluster(cluster),
      rank(rank),
      index(index),
      threads(threads),
      shared(shared),
      alive(threads),
      memory(new SharedMemory),
      copied(new SharedMemory),
      units(kSharedBytes / 16),
      warps((threads + 31) / 32),
      warpgroups((threads + 127) / 128) {
  // 0xFF bytes are NaN as float, as half and as bfloat16.
  memset(memory->bytes, 0xFF, kSharedBytes);
  for (int id = 0; id < 16; ++id) named[id].id = id;
  int count = 0;
  for (Warpgroup& warpgroup : warpgroups) {
    warpgroup.block = this;
    warpgroup.index = count++;
    warpgroup.number = 8 * rank + warpgroup.index;
  }
}

Cluster::Cluster(const std::function<void()>& kernel, int first, int size, int threads_each, int shared,
                 uint64_t seed)
    : schedule(seed), alive(size * threads_each) {
  for (int rank = 0; rank < size; ++rank) {
    Block& block = blocks.emplace_back(this, rank, first + rank, threads_each, shared);
    for (int index = 0; index < threads_each; ++index) {
      Thread& thread = threads.emplace_back(&block, index, kernel);
      // The registers of a kernel that is compiled for one block on each multiprocessor.
      thread.registers = min(255, 65536 / threads_each) / 8 * 8;
      ready.push_back(&thread);
    }
  }
}

bool Cluster::anything_pending() const {
  if (!pieces.empty()) return true;
  for (const Block& block : blocks)
    for (const Warpgroup& warpgroup : block.warpgroups)
      if (warpgroup.can_execute()) return true;
  return false;
}

// Does one piece of the asynchronous work that could be done now.
void Cluster::happen() {
  std::vector<Warpgroup*> able;
  for (Block& block : blocks)
    for (Warpgroup& warpgroup : block.warpgroups)
      if (warpgroup.can_execute()) able.push_back(&warpgroup);
  const size_t choice = schedule.below(static_cast<uint32_t>(able.size() + pieces.size()));
  if (choice < able.size()) return able[choice]->execute();
  const Piece piece = pieces[choice - able.size()];
  pieces.erase(pieces.begin() + (choice - able.size()));
  land(piece);
}

void Cluster::run() {
  for (;;) {
    if (anything_pending() && (ready.empty() || schedule.hasty())) {
      happen();
      continue;
    }
    if (ready.empty()) break;
    const size_t choice = schedule.pick(ready);
    self = ready[choice];
    std::swap(ready[choice], ready.front());
    ready.pop_front();
    threadIdx = {static_cast<unsigned>(self->index), 0, 0};
    blockIdx = {static_cast<unsigned>(self->block->index), 0, 0};
    self->fiber.resume();
    self = nullptr;
    if (!error.empty()) throw Failure(error);
  }
  if (alive > 0) deadlock();
  for (const Thread& thread : threads)
    if (thread.registers != threads[thread.number / 128 * 128].registers)
      throw Failure(thread.name() + ": has other registers than the rest of its warpgroup");
  for (Block& block : blocks)
    for (int i = block.shared; i < kSharedBytes; ++i)
      if (*block.at(i) != 0xFF)
        throw Failure(text("block %d: wrote beyond its shared memory, at %d of %d bytes", block.index, i,
                           block.shared));
}

// Fails with a list of all waits, one line for the threads of a warp that wait for the same.
void Cluster::deadlock() const {
  std::map<std::string, int> waits;
  for (const Thread& thread : threads)
    if (!thread.done)
      ++waits[text("block %d, warp %2d: ", thread.block->index, thread.index / 32) +
              thread.waits_for->describe(thread)];
  std::string message = "deadlock:";
  for (const auto& [wait, count] : waits) message += text("\n  %s (%d threads)", wait.c_str(), count);
  throw Failure(message);
}

uint32_t offset_of(const void* pointer, uint32_t bytes) {
  const Block& block = *self->block;
  const auto* place = static_cast<const unsigned char*>(pointer);
  if (place < block.at(0) || place + bytes > block.at(block.shared))
    fail("%u bytes at %p are not in its block's shared memory", bytes, pointer);
  return static_cast<uint32_t>(place - block.at(0));
}

uint32_t shared_address(const void* pointer) { return kSharedWindow + offset_of(pointer, 0); }
unsigned char* dynamic_shared() { return self->block->at(0); }
uint32_t cluster_rank() { return static_cast<uint32_t>(self->block->rank); }

namespace {

// Runs blocks in clusters of `cluster`; each cluster runs to its end before the next begins.
void run(const std::function<void()>& kernel, int cluster, int blocks, int threads, int shared) {
  if (blocks < 1 || blocks % cluster != 0 || threads < 1 || threads > 1024 || shared < 0 ||
      shared > kSharedBytes)
    throw Failure(text("no launch of %d blocks in clusters of %d, %d threads, %d bytes", blocks, cluster,
                       threads, shared));
  const char* seed = getenv("MOPO_EMULATOR_SEED");
  gridDim = {static_cast<unsigned>(blocks)};
  blockDim = {static_cast<unsigned>(threads)};
  for (int first = 0; first < blocks; first += cluster)
    Cluster(kernel, first, cluster, threads, shared, seed ? strtoull(seed, nullptr, 10) : 0).run();
}

cudaError_t with_errors(const std::function<void()>& work) {
  try {
    work();
  } catch (const Failure& failure) {
    last_error = failure.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const std::function<void()>& kernel, int cluster, int blocks, int threads, int shared) {
  return with_errors([&] {
    if (cluster < 1 || cluster > 8) throw Failure(text("no clusters of %d blocks", cluster));
    run(kernel, cluster, blocks, threads, shared);
  });
}

cudaError_t launch_together(const std::function<void()>& kernel, int blocks, int threads, int shared) {
  return with_errors([&] {
    if (blocks > multiprocessors()) throw Failure(text("%d blocks do not run at once", blocks));
    run(kernel, blocks, blocks, threads, shared);
  });
}

int multiprocessors() {
  const char* count = getenv("MOPO_EMULATOR_MULTIPROCESSORS");
  return count ? atoi(count) : 4;
}

// ---- Single instructions, as inaccurate as PTX allows; the result's bits decide the amount ----

namespace {

// A number in [-1, 1] that x's bits decide.
float arbitrary(float x) {
  uint32_t bits = __float_as_uint(x) * 0x9E3779B1u;
  bits = (bits ^ bits >> 15) * 0x85EBCA77u;
  return static_cast<float>(static_cast<int32_t>(bits ^ bits >> 13)) * 0x1p-31f;
}

uint32_t half_bits(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}

uint32_t bfloat16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

}  // namespace

// PTX ISA: a relative error of 2^-11 at most.
float tanh_approx(float x) { return tanhf(x) * (1.0f + 0x1p-11f * arbitrary(x)); }

// PTX ISA: two units in the last place.
float exp2_approx(float x) { return exp2f(x) * (1.0f + 0x1p-23f * arbitrary(x)); }

uint32_t pack(Operands type, float low, float high) {
  self->packed = true;
  return type == Operands::kHalf ? half_bits(low) | half_bits(high) << 16
                                 : bfloat16_bits(low) | bfloat16_bits(high) << 16;
}

}  // namespace mopo::emulator

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid value"
                                          : mopo::emulator::last_error.c_str();
}

// Few multiprocessors, so that a small batch keeps every block busy for more than one tile.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? mopo::emulator::multiprocessors()
                                                       : mopo::emulator::kSharedBytes;
  return cudaSuccess;
}
