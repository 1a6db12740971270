// Bulk copies: a copy is in flight after the call, and lands in pieces. Each piece is counted at its block's
// barrier.
#include "state.h"

namespace mopo::emulator {
namespace {

// Fails if a copy overwrites b of a product unless the copying thread knows that the product is done.
void check_target(const Block& block, uint32_t offset, uint32_t bytes) {
  for (uint32_t at = offset; at < offset + bytes; at += 16) {
    const Unit& unit = block.units[at / 16];
    if (unit.copy == Unit::kOnItsWay)
      fail("a bulk copy to +%u of block %d, where another is on its way", at, block.index);
    for (const Warpgroup& warpgroup : block.warpgroups)
      if (unit.products[warpgroup.index] > self->clock.of(warpgroup.number))
        fail("a bulk copy to +%u of block %d, onto b of a product of warpgroup %d that it knows no end of",
             at, block.index, warpgroup.index);
  }
}

}  // namespace

// Starts a copy. Its source is read when its bytes land.
void bulk_load(void* shared, const void* global, uint32_t bytes, SharedBarrier* barrier, uint16_t blocks) {
  pause();
  Cluster& cluster = *self->block->cluster;
  const uint32_t offset = offset_of(shared, bytes), at = offset_of(barrier, sizeof *barrier);
  const auto* source = static_cast<const unsigned char*>(global);
  if (offset % 16 != 0 || bytes % 16 != 0 || bytes == 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0)
    fail("bulk_load of %u bytes from %p to +%u: not all multiples of 16", bytes, global, offset);
  if (blocks == 0 || blocks >> cluster.blocks.size() != 0) fail("bulk_load to the blocks 0x%x", blocks);
  for (Block& block : cluster.blocks) {
    if ((blocks >> block.rank & 1) == 0) continue;
    BarrierState& state = barrier_of(block, at);
    if (!state.fenced) fail("bulk_load: the barrier at +%u is not fenced: fence_barrier_init", at);
    check_target(block, offset, bytes);
    memset(block.at(offset), 0xFF, bytes);
    for (uint32_t i = 0; i < bytes / 16; ++i) block.units[offset / 16 + i].copy = Unit::kOnItsWay;
    for (uint32_t done = 0; done < bytes;) {
      uint32_t part = bytes - done;
      if (cluster.schedule.chance(0.5)) part = 16 * (1 + cluster.schedule.below(part / 16));
      cluster.pieces.push_back({&block, offset + done, part, source + done, &state});
      done += part;
    }
  }
}

void land(const Piece& piece) {
  memcpy(piece.block->at(piece.offset), piece.source, piece.bytes);
  memcpy(piece.block->copied->bytes + piece.offset, piece.source, piece.bytes);
  for (uint32_t i = 0; i < piece.bytes / 16; ++i) {
    Unit& unit = piece.block->units[piece.offset / 16 + i];
    unit.copy = Unit::kLanded;
    unit.barrier = piece.barrier;
    unit.phase = piece.barrier->phase;
  }
  piece.barrier->count_bytes(-static_cast<int64_t>(piece.bytes));
}

}  // namespace mopo::emulator
