// Copies the rows of a rollout record that exist into the ring, one after the other: a warp takes a row.
#include "cuda/ptx.cuh"
#include "cuda/rollout_launch.h"

namespace mopo::cuda {

constexpr int kThreads = 256;

MOPO_DEVICE void copy(const float* from, float* to, int count) {
  for (int i = threadIdx.x % 32; i < count; i += 32) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads) compact_kernel(const __grid_constant__ CompactLaunch args) {
  const int64_t from = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  const int64_t rollout = from / args.horizon;
  const int t = static_cast<int>(from % args.horizon);
  const DeviceRecord& record = args.record;
  if (rollout >= args.batch || t >= record.lengths[rollout]) return;
  const RolloutOutput& out = args.out;
  const int64_t to = (args.head + args.offsets[rollout] + t) % args.capacity;
  const float* before =
      t == 0 ? args.start + rollout * args.obs_dim : record.next_observations + (from - 1) * args.obs_dim;
  copy(before, out.observations.at(to), args.obs_dim);
  copy(record.actions + from * args.act_dim, out.actions.at(to), args.act_dim);
  copy(record.next_observations + from * args.obs_dim, out.next_observations.at(to), args.obs_dim);
  if (threadIdx.x % 32 > 0) return;
  *out.rewards.at(to) = record.rewards[from];
  *out.terminals.at(to) = record.terminals[from];
  if (out.raw_rewards.data != nullptr) *out.raw_rewards.at(to) = record.raw_rewards[from];
  if (out.penalties.data != nullptr) *out.penalties.at(to) = record.penalties[from];
  if (out.members.data != nullptr) *out.members.at(to) = record.members[from];
  if (out.rollout_index.data != nullptr) *out.rollout_index.at(to) = args.rows[rollout];
  if (out.step.data != nullptr) *out.step.at(to) = t;
}

cudaError_t compact(const CompactLaunch& args, cudaStream_t cuda_stream) {
  const int64_t threads = int64_t{args.batch} * args.horizon * 32;
  const int blocks = static_cast<int>((threads + kThreads - 1) / kThreads);
  return ptx::launch<1>(compact_kernel, blocks, kThreads, 0, cuda_stream, args);
}

}  // namespace mopo::cuda
