// A rollout call: packs the policy, deals chunks of rollouts out to threads and puts their results into the
// output in order.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "arena.h"
#include "calls.h"
#include "packed.h"
#include "pool.h"

namespace mopo {
namespace {

// Width of the widest layer, or of an input: the next observations pass through the same memory.
int64_t widest(const RolloutArgs& args) {
  int64_t width = args.obs_dim + args.act_dim;
  for (const Network* network : {&args.dynamics, &args.policy})
    for (int64_t l = 0; l < network->depth; ++l) width = std::max(width, network->layers[l].out);
  return round_up(width, kWidthMultiple);
}

void lay_out(Arena& arena, const RolloutArgs& args, int64_t tile, int64_t rows, RolloutWorkspace& ws) {
  const int64_t dims = args.obs_dim + 1;
  const bool one_member = computes_one_member(args);
  const int64_t in_tiles = one_member ? tile : rows, members = one_member ? 1 : args.dynamics.networks;
  // The policy's outputs lie in the predictions' memory before these are made.
  const int64_t heads =
      std::max(round_up(2 * dims, kWidthMultiple) * members, round_up(2 * args.act_dim, kWidthMultiple));
  const int64_t width = widest(args);
  arena.take(ws.observations, in_tiles * args.obs_dim);
  arena.take(ws.actions, in_tiles * args.act_dim);
  arena.take(ws.inputs, in_tiles * (args.obs_dim + args.act_dim));
  arena.take(ws.predictions, in_tiles * heads);
  arena.take(ws.noise, round_up(std::max(dims, args.act_dim), 4) * tile);
  arena.take(ws.layers.in, width * tile);
  arena.take(ws.layers.out, width * tile);
  arena.take(ws.layers.raw, args.dynamics.layers[0].norm_scale != nullptr ? width * tile : 0);
  arena.take(ws.alive, rows);
  arena.take(ws.survivors, rows);
  arena.take(ws.drawn, one_member ? rows : 0);
  arena.take(ws.group_end, args.dynamics.networks + 1);
}

void lay_out(Arena& arena, const RolloutArgs& args, int64_t rows, ChunkOutput& output) {
  // A batch smaller than a chunk may have long rollouts: allocate no more rows than it has.
  const int64_t output_rows = std::min(rows, args.batch) * args.horizon;
  arena.take(output.observations, output_rows * args.obs_dim);
  arena.take(output.actions, output_rows * args.act_dim);
  arena.take(output.rewards, output_rows);
  arena.take(output.next_observations, output_rows * args.obs_dim);
  arena.take(output.terminals, output_rows);
  arena.take(output.raw_rewards, output_rows);
  arena.take(output.penalties, args.penalties ? output_rows : 0);
  arena.take(output.members, output_rows);
  arena.take(output.rollout_index, output_rows);
  arena.take(output.step, output_rows);
  arena.take(output.length, rows);
}

template <class Memory, class... Sizes>
void allocate(Arena& arena, Memory& memory, const Sizes&... sizes) {
  lay_out(arena, sizes..., memory);
  arena.allocate();
  lay_out(arena, sizes..., memory);
}

constexpr int64_t kChunkBytes = int64_t{2}
                                << 20;  // of predictions and output: about a core's second-level cache

// Bytes of output for each rollout, and of predictions where they are kept for a whole chunk.
int64_t row_bytes(const RolloutArgs& args) {
  const int64_t members = computes_one_member(args) ? 0 : args.dynamics.networks;
  return static_cast<int64_t>(sizeof(float)) *
         (2 * (args.obs_dim + 1) * members + args.horizon * (2 * args.obs_dim + args.act_dim + 8));
}

// Rollouts in a chunk: many, so that a member's weights are seldom read from memory; few, so that a chunk's
// predictions and output stay in cache. Where they do not, as with a hundred members or long horizons, only
// their reading and writing takes longer, and the rows are as many as memory permits. Where only the drawn
// member computes a row, a chunk has about twenty tiles for each elite, so that most of them are full.
int64_t chunk_rows(const RolloutArgs& args, int64_t tile) {
  constexpr int64_t kCachedRows = 480, kMostRows = 960, kTilesOfMember = 20;
  constexpr int64_t kMostBytes = int64_t{64} << 20;
  int64_t most = kMostRows;
  if (computes_one_member(args))
    most = args.num_elites * kTilesOfMember * tile;
  else if (kCachedRows * row_bytes(args) <= kChunkBytes)
    most = kCachedRows;
  const int64_t fair = (args.batch + args.threads - 1) / args.threads;
  const int64_t limit = std::max(tile, std::min(most, kMostBytes / row_bytes(args)) / tile * tile);
  // Chunks of one size: few large ones must keep every thread busy to the end.
  const int64_t chunks = (fair + limit - 1) / limit;
  return round_up((fair + chunks - 1) / chunks, tile);
}

// Chunks' outputs held in memory for each thread: the one it makes, and those that wait for their places.
// Only one where they are large.
int64_t chunks_held(const RolloutArgs& args, int64_t rows) {
  return std::clamp<int64_t>(4 * kChunkBytes / (rows * row_bytes(args)), 1, 4);
}

// Copies `rows` rows, from row `from` on, into the ring at row `to`.
void copy_rows(const RolloutArgs& args, const ChunkOutput& output, int64_t from, int64_t to, int64_t rows) {
  while (rows > 0) {
    to %= args.capacity;
    const int64_t count = std::min(rows, args.capacity - to);
    const auto copy = [&](const auto* source, const auto& target, int64_t width) {
      if (target.data == nullptr) return;
      if (target.stride == width) {
        std::copy_n(source + from * width, count * width, target.at(to));
        return;
      }
      for (int64_t row = 0; row < count; ++row)
        std::copy_n(source + (from + row) * width, width, target.at(to + row));
    };
    copy(output.observations, args.out.observations, args.obs_dim);
    copy(output.actions, args.out.actions, args.act_dim);
    copy(output.rewards, args.out.rewards, 1);
    copy(output.next_observations, args.out.next_observations, args.obs_dim);
    copy(output.terminals, args.out.terminals, 1);
    copy(output.raw_rewards, args.out.raw_rewards, 1);
    if (args.penalties) copy(output.penalties, args.out.penalties, 1);
    copy(output.members, args.out.members, 1);
    copy(output.rollout_index, args.out.rollout_index, 1);
    copy(output.step, args.out.step, 1);
    from += count;
    to += count;
    rows -= count;
  }
}

// The output of one chunk, until its place in the ring is known.
struct Made {
  ChunkOutput output;
  int64_t rows;  // rollouts
  int64_t to;    // first row in the ring
};

// Copies a chunk's transitions into the ring, contiguous ones at once.
void commit(const RolloutArgs& args, const Made& made) {
  int64_t begin = 0, count = 0, to = made.to;
  for (int64_t r = 0; r < made.rows; ++r) {
    if (begin + count != r * args.horizon) {
      copy_rows(args, made.output, begin, to, count);
      to += count;
      begin = r * args.horizon;
      count = 0;
    }
    count += made.output.length[r];
  }
  copy_rows(args, made.output, begin, to, count);
}

// Deals chunks out to threads and gives their results places in the order of the chunks, so that the output
// does not depend on the threads. A thread need not wait for a slower one: finished chunks may be some ahead
// of their turn.
class ChunkOrder {
 public:
  ChunkOrder(const RolloutArgs& args, int64_t chunks, std::vector<Made>& made)
      : args_(args), chunks_(chunks), finished_(made.size()) {
    for (Made& one : made) free_.push_back(&one);
  }

  // Deals out no more chunks.
  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      next_ = chunks_;
    }
    freed_.notify_all();
  }

  // Takes the next chunk and returns room for its output, when there is some; nullptr when no chunk is left.
  Made* take(int64_t& chunk) {
    std::unique_lock<std::mutex> lock(mutex_);
    freed_.wait(lock, [this] { return next_ == chunks_ || !free_.empty(); });
    if (next_ == chunks_) return nullptr;
    chunk = next_++;
    Made* made = free_.back();
    free_.pop_back();
    return made;
  }

  // Appends to `ready` this chunk and those behind it, as far as their places are now known.
  void finish(int64_t chunk, Made* made, std::vector<Made*>& ready) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // A slot is free: no more chunks are under way than there are outputs.
    const auto at = [this](int64_t i) -> Made*& { return finished_[i % finished_.size()]; };
    at(chunk) = made;
    for (; at(placed_) != nullptr; ++placed_) {
      Made& one = *std::exchange(at(placed_), nullptr);
      one.to = args_.head + counts_.written;
      for (int64_t r = 0; r < one.rows; ++r) counts_.written += one.output.length[r];
      counts_.non_finite += one.output.non_finite;
      counts_.truncated += one.output.truncated;
      ready.push_back(&one);
    }
  }

  // Frees outputs that have been copied.
  void release(std::vector<Made*>& ready) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.insert(free_.end(), ready.begin(), ready.end());
    }
    freed_.notify_all();
    ready.clear();
  }

  RolloutCounts counts() const { return counts_; }

 private:
  const RolloutArgs& args_;
  const int64_t chunks_;
  int64_t next_ = 0, placed_ = 0;
  std::vector<Made*> free_, finished_;
  RolloutCounts counts_{};
  std::mutex mutex_;
  std::condition_variable freed_;
};

}  // namespace

bool interrupted(Interrupt& interrupt) noexcept { return interrupt.requested(); }

RolloutCounts rollout(const RolloutArgs& args, const Packed& dynamics, const Kernels& kernels,
                      Interrupt& interrupt) {
  const Packing& packing = kernels.packings[static_cast<int>(args.precision)];
  const Packed policy(args.policy, packing);
  std::vector<float> inverse_std, exp_minus_max, exp_min;
  for (int64_t d = 0; d < args.obs_dim + args.act_dim; ++d) inverse_std.push_back(1.0f / args.input_std[d]);
  for (int64_t i = 0; i < args.dynamics.networks * (args.obs_dim + 1); ++i) {
    exp_minus_max.push_back(std::exp(-args.max_logvar[i]));
    exp_min.push_back(std::exp(args.min_logvar[i]));
  }
  const int64_t rows = chunk_rows(args, packing.tile), chunks = (args.batch + rows - 1) / rows;
  const RolloutPlan plan{dynamics.view(),      policy.view(),  inverse_std.data(),
                         exp_minus_max.data(), exp_min.data(), &interrupt};

  // All memory is taken before the threads start, so that nothing can fail in them.
  const int threads = static_cast<int>(std::min<int64_t>(args.threads, chunks));
  std::vector<RolloutWorkspace> workspaces(threads);
  std::vector<Made> made(threads == 1 ? 1 : std::min<int64_t>(chunks, chunks_held(args, rows) * threads));
  std::vector<Arena> arenas(workspaces.size() + made.size());
  auto arena = arenas.begin();
  for (RolloutWorkspace& ws : workspaces) allocate(*arena++, ws, args, packing.tile, rows);
  for (Made& one : made) allocate(*arena++, one.output, args, rows);
  std::vector<std::vector<Made*>> ready(threads);
  for (auto& some : ready) some.reserve(made.size());

  ChunkOrder order(args, chunks, made);
  const auto work = [&](int thread) {
    int64_t chunk;
    while (Made* mine = order.take(chunk)) {
      const int64_t first = chunk * rows;
      mine->rows = std::min(rows, args.batch - first);
      kernels.rollout_chunk(args, plan, workspaces[thread], mine->output, first, mine->rows);
      // The chunk may be unfinished, so neither it nor a later one gets a place.
      if (interrupt.requested()) return order.stop();
      order.finish(chunk, mine, ready[thread]);
      for (const Made* one : ready[thread]) commit(args, *one);
      order.release(ready[thread]);
    }
  };
  parallel(threads, work, interrupt);
  return order.counts();
}

}  // namespace mopo
