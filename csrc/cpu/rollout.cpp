#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "arena.h"
#include "dispatch.h"
#include "pool.h"

namespace mopo {
namespace {

// To nearest, ties to even; a NaN stays one.
uint32_t round_to_bfloat16(float x) {
  if (x != x) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

class Packed {
 public:
  Packed(const Network& network, const Packing& packing)
      : network_(network), packing_(packing), offset_(network.depth) {
    int64_t stride = 0;
    for (int64_t l = 0; l < network.depth; ++l) {
      offset_[l] = stride;
      stride += (words(l) + 1) * width(l);
    }
    float* data = nullptr;
    arena_.take(data, stride * network.networks);
    arena_.allocate_zeroed();
    arena_.take(data, stride * network.networks);
    for (int64_t member = 0; member < network.networks; ++member)
      for (int64_t l = 0; l < network.depth; ++l) pack(member, l, data + member * stride + offset_[l]);
    view_ = {data, stride, offset_.data()};
  }

  const PackedNetwork& view() const { return view_; }

 private:
  int64_t width(int64_t l) const { return round_up(network_.layers[l].out, packing_.outputs); }
  int64_t words(int64_t l) const {
    return round_up((network_.layers[l].in + packing_.terms - 1) / packing_.terms, packing_.words);
  }

  void pack(int64_t member, int64_t l, float* to) const {
    const Layer& layer = network_.layers[l];
    const float* weight = layer.weight + member * layer.in * layer.out;
    const int64_t outputs = packing_.outputs, together = packing_.words;
    for (int64_t k = 0, word = 0; k < layer.in; k += packing_.terms, ++word)
      for (int64_t n = 0; n < layer.out; n += outputs) {
        const int64_t group = n / outputs * (words(l) / together) + word / together;
        float* target = to + group * outputs * together + word % together;
        const float* first = weight + k * layer.out + n;
        const int64_t count = std::min(outputs, layer.out - n);
        if (packing_.terms == 1)
          for (int64_t j = 0; j < count; ++j) target[j * together] = first[j];
        else
          for (int64_t j = 0; j < count; ++j)
            target[j * together] = pair(first[j], k + 1 < layer.in ? first[layer.out + j] : 0.0f);
      }
    std::copy_n(layer.bias + member * layer.out, layer.out, to + words(l) * width(l));
  }

  static float pair(float first, float second) {
    return std::bit_cast<float>(round_to_bfloat16(first) | round_to_bfloat16(second) << 16);
  }

  const Network& network_;
  const Packing packing_;
  std::vector<int64_t> offset_;
  Arena arena_;
  PackedNetwork view_{};
};

// Room for any layer's output, and for the next observations, which pass through the same memory.
int64_t widest(const RolloutArgs& args) {
  int64_t width = args.obs_dim + args.act_dim;
  for (const Network* network : {&args.dynamics, &args.policy})
    for (int64_t l = 0; l < network->depth; ++l) width = std::max(width, network->layers[l].out);
  return round_up(width, kRoom);
}

void lay_out(Arena& arena, const RolloutArgs& args, int64_t tile, int64_t rows, RolloutWorkspace& ws) {
  const int64_t dims = args.obs_dim + 1;
  // The policy's heads pass through the predictions.
  const int64_t heads =
      std::max(round_up(2 * dims, kRoom) * args.dynamics.networks, round_up(2 * args.act_dim, kRoom));
  const int64_t width = widest(args);
  // A small batch does not fill its one chunk; its records may be long.
  const int64_t records = std::min(rows, args.batch) * args.horizon;
  arena.take(ws.observations, rows * args.obs_dim);
  arena.take(ws.actions, rows * args.act_dim);
  arena.take(ws.inputs, rows * (args.obs_dim + args.act_dim));
  arena.take(ws.predictions, rows * heads);
  arena.take(ws.noise, round_up(std::max(dims, args.act_dim), 4) * tile);
  arena.take(ws.layer_in, width * tile);
  arena.take(ws.layer_out, width * tile);
  arena.take(ws.alive, rows);
  arena.take(ws.survivors, rows);
  arena.take(ws.drawn, tile);
  arena.take(ws.length, rows);
  arena.take(ws.record.observations, records * args.obs_dim);
  arena.take(ws.record.actions, records * args.act_dim);
  arena.take(ws.record.rewards, records);
  arena.take(ws.record.next_observations, records * args.obs_dim);
  arena.take(ws.record.terminals, records);
  arena.take(ws.record.raw_rewards, records);
  arena.take(ws.record.penalties, records);
  arena.take(ws.record.members, records);
  arena.take(ws.record.rollout_index, records);
  arena.take(ws.record.step, records);
}

// Rows in a chunk: enough that a member's weights are read from memory seldom, few enough that a chunk's
// predictions and records stay in cache.
int64_t chunk_rows(const RolloutArgs& args, int64_t tile) {
  constexpr int64_t kMostRows = 480, kBytes = int64_t{2} << 20;
  const int64_t per_row =
      static_cast<int64_t>(sizeof(float)) * (2 * (args.obs_dim + 1) * args.dynamics.networks +
                                             args.horizon * (2 * args.obs_dim + args.act_dim + 8));
  const int64_t fair = (args.batch + args.threads - 1) / args.threads;
  const int64_t rows = std::min({kMostRows, kBytes / per_row, round_up(fair, tile)});
  return std::max(tile, rows / tile * tile);
}

// Copies `rows` records from row `from` into the ring at row `to`.
void copy_records(const RolloutArgs& args, const RolloutRecord& record, int64_t from, int64_t to,
                  int64_t rows) {
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
    copy(record.observations, args.out.observations, args.obs_dim);
    copy(record.actions, args.out.actions, args.act_dim);
    copy(record.rewards, args.out.rewards, 1);
    copy(record.next_observations, args.out.next_observations, args.obs_dim);
    copy(record.terminals, args.out.terminals, 1);
    copy(record.raw_rewards, args.out.raw_rewards, 1);
    copy(record.penalties, args.out.penalties, 1);
    copy(record.members, args.out.members, 1);
    copy(record.rollout_index, args.out.rollout_index, 1);
    copy(record.step, args.out.step, 1);
    from += count;
    to += count;
    rows -= count;
  }
}

// Copies a chunk's rollouts, each as long as it lasted, in as few pieces as there are.
void commit(const RolloutArgs& args, const RolloutWorkspace& ws, int64_t rows, int64_t to) {
  int64_t begin = 0, count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (begin + count != r * args.horizon) {
      copy_records(args, ws.record, begin, to, count);
      to += count;
      begin = r * args.horizon;
      count = 0;
    }
    count += ws.length[r];
  }
  copy_records(args, ws.record, begin, to, count);
}

}  // namespace

RolloutCounts rollout(const RolloutArgs& args, const Kernels& kernels) {
  const Packing& packing = args.bfloat16 ? kernels.bfloat16 : kernels.float32;
  const Packed dynamics(args.dynamics, packing), policy(args.policy, packing);
  std::vector<float> inverse_std, exp_minus_max, exp_min;
  for (int64_t d = 0; d < args.obs_dim + args.act_dim; ++d) inverse_std.push_back(1.0f / args.input_std[d]);
  for (int64_t i = 0; i < args.dynamics.networks * (args.obs_dim + 1); ++i) {
    exp_minus_max.push_back(std::exp(-args.max_logvar[i]));
    exp_min.push_back(std::exp(args.min_logvar[i]));
  }
  const int64_t rows = chunk_rows(args, packing.tile), chunks = (args.batch + rows - 1) / rows;
  const RolloutPlan plan{dynamics.view(), policy.view(), inverse_std.data(), exp_minus_max.data(),
                         exp_min.data()};

  // All memory is taken before the threads start, so that nothing can fail in them.
  const int threads = static_cast<int>(std::min<int64_t>(args.threads, chunks));
  std::vector<RolloutWorkspace> workspaces(threads);
  std::vector<Arena> arenas(threads);
  for (int i = 0; i < threads; ++i) {
    lay_out(arenas[i], args, packing.tile, rows, workspaces[i]);
    arenas[i].allocate();
    lay_out(arenas[i], args, packing.tile, rows, workspaces[i]);
  }

  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable turn;
  int64_t committed = 0;  // chunks whose place in the output is known
  RolloutCounts counts{0, 0};
  parallel(threads, [&](int thread) {
    RolloutWorkspace& ws = workspaces[thread];
    for (int64_t chunk; (chunk = next++) < chunks;) {
      const int64_t first = chunk * rows, size = std::min(rows, args.batch - first);
      kernels.rollout_chunk(args, plan, ws, first, size);
      int64_t written = 0, to;
      for (int64_t r = 0; r < size; ++r) written += ws.length[r];
      {
        // Chunks take their places in order, so that the output does not depend on the threads.
        std::unique_lock<std::mutex> lock(mutex);
        turn.wait(lock, [&] { return committed == chunk; });
        to = args.head + counts.written;
        counts.written += written;
        counts.non_finite += ws.non_finite;
        ++committed;
      }
      turn.notify_all();
      commit(args, ws, size, to);
    }
  });
  return counts;
}

}  // namespace mopo
