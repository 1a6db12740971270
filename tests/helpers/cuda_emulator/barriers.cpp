// Means by which threads wait for one another: collectives, barriers, counters, registers.
#include <algorithm>

#include "state.h"

namespace mopo::emulator {

// ---- Collectives ----

std::string Meeting::describe(const Thread&) const { return text("%s, %d have come", what, arrived); }

void Meeting::meet(const char* name, int members) {
  if (arrived > 0 && strcmp(what, name) != 0)
    fail("it is at %s, others of its warp or block at %s", name, what);
  what = name;
  ++arrived;
  gathered.learn(self->clock);
  const uint64_t mine = generation;
  expect(members);
  while (generation == mine) wait_for(*this);
  self->clock.learn(told);
}

void Meeting::expect(int members) {
  if (arrived == 0 || arrived < members) return;
  arrived = 0;
  ++generation;
  complete();
}

void cluster_sync() {
  Cluster& cluster = *self->block->cluster;
  for (BarrierState& barrier : cluster.barriers)
    if (barrier.initialised_by == self) barrier.announced = barrier.fenced;
  self->warp->meeting.meet("cluster_sync", self->warp->lanes);
  cluster.sync.meet("cluster_sync", cluster.alive);
  for (BarrierState& barrier : cluster.barriers) barrier.published |= barrier.announced;
}

// Shuffles use the two rows of `exchange` in turn: a lane may be one shuffle ahead of another, not two.
float shuffle_xor(float x, int mask) {
  Warp& warp = *self->warp;
  const int lane = self->index % 32;
  if (mask < 0 || (lane ^ mask) >= warp.lanes) fail("a shuffle with lane %d", lane ^ mask);
  float* exchange = warp.exchange[self->shuffles++ % 2];
  exchange[lane] = x;
  warp.meeting.meet("shuffle", warp.lanes);
  return exchange[lane ^ mask];
}

// ---- mbarrier: a phase ends when no arrival and no byte is missing ----

namespace {

// The word of an initialised barrier is kMark xor its number.
constexpr uint64_t kMark = 0xBA221E5000000000u;

BarrierState* find(const Block& block, const SharedBarrier* barrier) {
  Cluster& cluster = *block.cluster;
  const uint64_t number = barrier->word ^ kMark;
  return number < cluster.barriers.size() ? &cluster.barriers[number] : nullptr;
}

}  // namespace

BarrierState& barrier_of(Block& block, uint32_t offset) {
  BarrierState* state = find(block, reinterpret_cast<SharedBarrier*>(block.at(offset)));
  if (state == nullptr || state->block != &block || state->offset != offset)
    fail("the barrier at +%u of block %d is not initialised", offset, block.index);
  // Asynchronous copies and other blocks see the barrier only once it is published.
  if (&block != self->block && !state->published)
    fail("the barrier at +%u of block %d is not known to the cluster: fence_barrier_init, then cluster_sync",
         offset, block.index);
  if (block.alive == 0) fail("the barrier at +%u of block %d, which has ended", offset, block.index);
  return *state;
}

std::string BarrierState::describe(const Thread& who) const {
  return text("barrier_wait(+%u, parity %u), in phase %llu, %u of %u arrivals and %lld bytes missing", offset,
              who.waits_parity, static_cast<unsigned long long>(phase), pending, count,
              static_cast<long long>(bytes));
}

void BarrierState::advance() {
  if (pending > 0 || bytes != 0) return;
  ++phase;
  pending = count;
  complete();
}

void BarrierState::arrive() {
  if (pending == 0) fail("the barrier at +%u: more arrivals in a phase than its %u", offset, count);
  --pending;
  gathered.learn(self->clock);
  advance();
}

// PTX ISA: tx-count lies within +-(2^20 - 1). It may be negative, since bytes are counted when they land.
void BarrierState::count_bytes(int64_t change) {
  bytes += change;
  if (std::abs(bytes) >= 1 << 20)
    fail("the barrier at +%u: %lld bytes", offset, static_cast<long long>(bytes));
  advance();
}

void barrier_init(SharedBarrier* barrier, uint32_t count) {
  const uint32_t offset = offset_of(barrier, sizeof *barrier);
  Block& block = *self->block;
  if (offset % 8 != 0 || count == 0 || count >= 1 << 20) fail("barrier_init(+%u, %u)", offset, count);
  if (find(block, barrier) != nullptr) fail("the barrier at +%u is initialised twice", offset);
  barrier->word = kMark ^ block.cluster->barriers.size();
  BarrierState& state = block.cluster->barriers.emplace_back();
  state.block = &block;
  state.offset = offset;
  state.number = 8 * block.cluster->blocks.size() + block.cluster->barriers.size();
  state.count = state.pending = count;
  state.initialised_by = self;
}

void fence_barrier_init() {
  for (BarrierState& barrier : self->block->cluster->barriers)
    if (barrier.initialised_by == self) barrier.fenced = true;
}

void barrier_arrive_expect(SharedBarrier* barrier, uint32_t bytes) {
  pause();
  BarrierState& state = barrier_of(*self->block, offset_of(barrier, sizeof *barrier));
  // Bytes before the arrival: the phase must not end between the two.
  state.bytes += bytes;
  state.count_bytes(0);
  state.arrive();
}

void barrier_arrive_at(SharedBarrier* barrier, uint32_t rank) {
  pause();
  Cluster& cluster = *self->block->cluster;
  const uint32_t offset = offset_of(barrier, sizeof *barrier);
  if (rank >= cluster.blocks.size()) fail("barrier_arrive_at(+%u, rank %u)", offset, rank);
  barrier_of(cluster.blocks[rank], offset).arrive();
}

// Waits by parity: returns if the last phase that ended has this parity, whichever phase the caller meant.
void barrier_wait(SharedBarrier* barrier, uint32_t parity) {
  pause();
  BarrierState& state = barrier_of(*self->block, offset_of(barrier, sizeof *barrier));
  if (parity > 1) fail("barrier_wait(+%u, parity %u)", state.offset, parity);
  self->waits_parity = parity;
  while ((state.phase & 1) == parity) wait_for(state);
  self->clock.learn(state.told);
  self->clock.learn(state.number, state.phase);
}

// ---- Named barriers: they count threads, warp by warp, and start over when all have arrived ----

std::string NamedBarrier::describe(const Thread&) const {
  return text("named_sync(%d, %d), %zu threads have come", id, expected, arrived.size());
}

void NamedBarrier::arrive(int threads, Thread& who) {
  if (threads <= 0 || threads % 32 != 0 || threads > who.block->threads)
    fail("named barrier %d of %d threads", id, threads);
  if (!arrived.empty() && expected != threads)
    fail("named barrier %d: of %d threads here, of %d for those that have come", id, threads, expected);
  if (std::find(arrived.begin(), arrived.end(), &who) != arrived.end())
    fail("named barrier %d: it comes a second time before all have come once", id);
  expected = threads;
  arrived.push_back(&who);
  gathered.learn(who.clock);
  if (static_cast<int>(arrived.size()) < threads) return;
  arrived.clear();
  ++generation;
  complete();
}

namespace {

NamedBarrier& named_barrier(const char* what, int id) {
  pause();
  if (id < 1 || id > 15) fail("named barrier %d", id);
  // .aligned: all threads of the warp execute it together.
  self->warp->meeting.meet(what, self->warp->lanes);
  return self->block->named[id];
}

}  // namespace

void named_sync(int id, int threads) {
  NamedBarrier& barrier = named_barrier("named_sync", id);
  const uint64_t mine = barrier.generation;
  barrier.arrive(threads, *self);
  while (barrier.generation == mine) wait_for(barrier);
  self->clock.learn(barrier.told);
}

void named_arrive(int id, int threads) { named_barrier("named_arrive", id).arrive(threads, *self); }

// ---- Counters in global memory ----

std::string Arrivals::describe(const Thread& who) const { return text("wait_for(%u)", who.waits_count); }

void arrive(uint32_t* counter) {
  pause();
  ++*counter;
  self->block->cluster->arrivals.wake();
}

void wait_for(const uint32_t* counter, uint32_t count) {
  pause();
  self->waits_count = count;
  while (static_cast<int32_t>(*counter - count) < 0) wait_for(self->block->cluster->arrivals);
}

// ---- setmaxnreg: a warpgroup that asks for more waits until the pool has them ----

std::string RegisterPool::describe(const Thread& who) const {
  return text("more_registers, has %d, %d are free in the block", who.registers, free);
}

void more_registers(int count) {
  self->warp->meeting.meet("more_registers", self->warp->lanes);
  RegisterPool& pool = self->block->registers;
  const int more = count - self->registers;
  if (more < 0) fail("more_registers<%d>, has %d", count, self->registers);
  while (pool.free < more) wait_for(pool);
  pool.free -= more;
  self->registers = count;
}

void fewer_registers(int count) {
  self->warp->meeting.meet("fewer_registers", self->warp->lanes);
  if (count > self->registers) fail("fewer_registers<%d>, has %d", count, self->registers);
  RegisterPool& pool = self->block->registers;
  pool.free += self->registers - count;
  self->registers = count;
  pool.wake();
}

}  // namespace mopo::emulator

void __syncthreads() {
  using mopo::emulator::self;
  self->warp->meeting.meet("__syncthreads", self->warp->lanes);
  self->block->syncthreads.meet("__syncthreads", self->block->alive);
}

void __syncwarp(unsigned mask) {
  using mopo::emulator::self;
  if (mask != ~0u) mopo::emulator::fail("__syncwarp of a part of the warp");
  self->warp->meeting.meet("__syncwarp", self->warp->lanes);
}
