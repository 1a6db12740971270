// A call that evaluates a policy at sampled states: packs the networks and shares the states out to threads.
#include <algorithm>
#include <vector>

#include "arena.h"
#include "calls.h"
#include "packed.h"
#include "pool.h"

namespace mopo {
namespace {

void lay_out(Arena& arena, const ValuesArgs& args, int64_t tile, ValuesWorkspace& ws) {
  const int64_t inputs = args.obs_dim + args.act_dim;
  int64_t widest = std::max(inputs, 2 * args.act_dim);
  for (const Network* network : {&args.policy, &args.critics})
    for (int64_t l = 0; l < network->depth; ++l) widest = std::max(widest, network->layers[l].out);
  widest = round_up(widest, kWidthMultiple);
  arena.take(ws.inputs, inputs * tile);
  arena.take(ws.noise, round_up(std::max(args.obs_dim, args.act_dim), 4) * tile);
  arena.take(ws.outputs, widest * tile);
  arena.take(ws.layers.in, widest * tile);
  arena.take(ws.layers.out, widest * tile);
}

}  // namespace

bool least_values(const ValuesArgs& args, const Kernels& kernels, Interrupt& interrupt) {
  const Packing& packing = kernels.packings[static_cast<int>(args.precision)];
  const Packed policy(args.policy, packing), critics(args.critics, packing);
  const ValuesPlan plan{policy.view(), critics.view(), &interrupt};
  const int64_t states = args.samples * args.members * args.rows;
  const int64_t tiles = (states + packing.tile - 1) / packing.tile;
  const int threads = static_cast<int>(std::min<int64_t>(args.threads, tiles));
  // All memory is taken before the threads start, so that nothing can fail in them.
  std::vector<ValuesWorkspace> workspaces(threads);
  std::vector<Arena> arenas(threads);
  for (int thread = 0; thread < threads; ++thread) {
    lay_out(arenas[thread], args, packing.tile, workspaces[thread]);
    arenas[thread].allocate();
    lay_out(arenas[thread], args, packing.tile, workspaces[thread]);
  }
  const auto first = [&](int thread) { return std::min(states, tiles * thread / threads * packing.tile); };
  const auto work = [&](int thread) {
    kernels.least_values(args, plan, workspaces[thread], first(thread), first(thread + 1));
  };
  parallel(threads, work, interrupt);
  return !interrupt.requested();
}

}  // namespace mopo
