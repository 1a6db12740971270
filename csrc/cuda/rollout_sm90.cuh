// The rollout on Hopper: a block takes tiles of 128 rollouts through all steps, with their activations in
// registers.
//
// Two warpgroups, the consumers, multiply 64 rows each and take turns at the tensor cores: the activations of
// one overlap with the products of the other. A producer thread brings the weights, in chunks, through a ring
// of stages in shared memory; the two blocks of a cluster each fetch half of every chunk for both. Features
// are permuted so that a thread holds the dimensions 4 j + q, q = lane % 4, of two rows both in a product's
// operand and in its result: threads exchange nothing but sums over the four that share a row.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/random.cuh"
#include "cuda/rollout_launch.h"
#include "scalar.h"

namespace mopo::cuda {

constexpr int kTile = 128;                       // rollouts of a block
constexpr int kConsumers = 2 * ptx::kWarpgroup;  // threads that multiply
constexpr int kThreads = kConsumers + ptx::kWarpgroup;
constexpr int kCluster = 2;
constexpr int kActionSlots = 2;  // a slot is four dimensions, one for each thread of a row
// The ring. mopo_fast/backends/gpu/hopper_weights.py cuts a layer into the fewest chunks of at most
// kStageBytes, its SLOT_BYTES.
constexpr int kStages = 8;
constexpr int kStageBytes = 26880;
constexpr int kBarrierBytes = 2 * kStages * sizeof(ptx::SharedBarrier);
// Behind the ring and its barriers lie the ensemble's inputs, four words for each k-step (16 inputs) and
// consumer.
constexpr int kMaxInputSteps = 3;
constexpr int kSharedBytes = kStages * kStageBytes + kBarrierBytes + 4 * kMaxInputSteps * 4 * kConsumers;

MOPO_INLINE constexpr int round_up(int count, int multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// ---- The ring: chunk n lies in stage n % kStages, whose barriers are then in phase n / kStages ----

MOPO_DEVICE unsigned char* stage(uint32_t n) { return ptx::dynamic_shared() + n % kStages * kStageBytes; }
// Its phase ends when the chunk is there, in this block.
MOPO_DEVICE ptx::SharedBarrier* full(uint32_t n) {
  return reinterpret_cast<ptx::SharedBarrier*>(ptx::dynamic_shared() + kStages * kStageBytes) + n % kStages;
}
// Its phase ends when the consumers' warps of both blocks are done with the chunk.
MOPO_DEVICE ptx::SharedBarrier* empty(uint32_t n) { return full(n) + kStages; }

MOPO_DEVICE void init_ring() {
  for (int n = 0; n < kStages; ++n) {
    ptx::barrier_init(full(n), 1);
    ptx::barrier_init(empty(n), kCluster * kConsumers / 32);
  }
  ptx::fence_barrier_init();
}

// A block's tiles begin at first_tile() and lie next_tile() rows apart. Both blocks of a cluster go on until
// neither has rows left, since each needs the other's half of the weights.
MOPO_DEVICE int first_tile() { return blockIdx.x * kTile; }
MOPO_DEVICE int next_tile() { return gridDim.x * kTile; }
MOPO_DEVICE bool is_tile(int row, int batch) { return row / (kCluster * kTile) * (kCluster * kTile) < batch; }

// The producer thread: brings all weights, once for each step.
MOPO_DEVICE void produce(const RolloutLaunch& args) {
  const uint32_t rank = ptx::cluster_rank();
  uint32_t n = 0;
  for (int row = first_tile(); is_tile(row, args.batch); row += next_tile())
    for (int t = 0; t < args.horizon; ++t) {
      const unsigned char* chunk = args.weights;
#pragma unroll 1
      for (int i = 0; i < args.chunks; ++i, ++n) {
        const uint32_t bytes = args.chunk_bytes[i], half = bytes / kCluster;
        ptx::barrier_wait(empty(n), n / kStages % 2 ^ 1);
        ptx::barrier_arrive_expect(full(n), bytes);
        ptx::bulk_load(stage(n) + rank * half, chunk + rank * half, half, full(n), (1 << kCluster) - 1);
        chunk += bytes;
      }
    }
}

// ---- Products and activations ----

constexpr int kPolicyWidth = 256;

// A consumer: one of the two warpgroups that multiply.
struct Consumer {
  int group;       // 0 or 1
  uint32_t n = 0;  // chunks read

  // d = bias + a * weight, for the next layer in the ring.
  template <class T, int kSteps, int kCount>
  MOPO_DEVICE void multiply(T type, const uint32_t (&a)[kSteps][4], float (&d)[kCount]) {
    constexpr int kColumns = 2 * kCount, kImage = 32 * kColumns, kBias = round_up(4 * kColumns, 128);
    constexpr int kMost = (kStageBytes - kBias) / kImage;  // k-steps of a chunk
    constexpr int kChunks = (kSteps + kMost - 1) / kMost;
    static_assert(kChunks <= kStages, "the other group waits with the layer before");
    const unsigned char* image = wait();
    load_bias(image, d);
    image += kBias;
    take_turn();
    ptx::keep(d);
    // Chunks are as even as possible, so that the last one's products cover the change of turns.
    const auto begin = [](int chunk) { return (chunk * kSteps + kChunks - 1) / kChunks; };
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk > 0) image = wait();
      const uint64_t matrix = ptx::matrix(image, kImage / 2, 128);
      ptx::products_begin();
#pragma unroll
      for (int s = begin(chunk); s < begin(chunk + 1); ++s)
        ptx::multiply_add(type, d, a[s], ptx::behind(matrix, (s - begin(chunk)) * kImage));
      ptx::products_commit();
      // The products under way keep the tensor cores busy until the other group's begin.
      if (chunk == kChunks - 1) pass_turn();
      if (chunk > 0) {
        ptx::products_wait<1>();
        release(n - 2);
      }
    }
    ptx::products_wait<0>();
    ptx::keep(d);
    release(n - 1);
  }

  // Waits for the next chunk and returns where it lies.
  MOPO_DEVICE const unsigned char* wait() {
    ptx::barrier_wait(full(n), n / kStages % 2);
    return stage(n++);
  }

  // Tells both blocks' producers, of which each fills half of the stage: one lane for each.
  MOPO_DEVICE void release(uint32_t chunk) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kCluster) ptx::barrier_arrive_at(empty(chunk), lane);
  }

  template <int kCount>
  MOPO_DEVICE static void load_bias(const unsigned char* image, float (&d)[kCount]) {
    const float2* bias = reinterpret_cast<const float2*>(image) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float2 pair = bias[4 * j];
      d[4 * j] = d[4 * j + 2] = pair.x;
      d[4 * j + 1] = d[4 * j + 3] = pair.y;
    }
  }

  // It is group g's turn when the other group has arrived at named barrier 1 + g, where group g waits.
  MOPO_DEVICE void start_turns() const {
    if (group == 1) pass_turn();
  }
  MOPO_DEVICE void take_turn() const { ptx::named_sync(1 + group, kConsumers); }
  MOPO_DEVICE void pass_turn() const { ptx::named_arrive(2 - group, kConsumers); }
  // Takes the last turn that group 1 has passed on, so that no arrival is left at the barrier.
  MOPO_DEVICE void end_turns() const {
    if (group == 0) take_turn();
  }
};

template <int kCount>
MOPO_DEVICE void activate(Activation activation, float (&d)[kCount]) {
  switch (activation) {
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float u = 0.5f * d[i];
        d[i] = u + u * ptx::tanh_approx(u);
      }
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] = d[i] < 0.0f ? 0.0f : d[i];  // A maximum would hide a NaN.
      return;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] = ptx::tanh_approx(d[i]);
      return;
  }
}

// out = activation(in * weight + bias), packed as the next layer's operand.
template <int kWidth, class T, int kSteps>
MOPO_DEVICE void hidden_layer(Consumer& consumer, T type, Activation activation,
                              const uint32_t (&in)[kSteps][4],
                              uint32_t (&out)[round_up(kWidth, 16) / 16][4]) {
  float d[kWidth / 2];
  consumer.multiply(type, in, d);
  activate(activation, d);
  // A thread's pairs of d are the pairs of the next product's a that it has to hold.
#pragma unroll
  for (int pair = 0; pair < round_up(kWidth, 16) / 4; ++pair)
    out[pair / 4][pair % 4] = pair < kWidth / 4 ? ptx::pack(type, d[2 * pair], d[2 * pair + 1]) : 0;
}

template <int kWidth, class T, int kSteps, int kCount>
MOPO_DEVICE void network(Consumer& consumer, T type, Activation activation, int hidden_layers,
                         const uint32_t (&in)[kSteps][4], float (&heads)[kCount]) {
  uint32_t a[round_up(kWidth, 16) / 16][4];
  hidden_layer<kWidth>(consumer, type, activation, in, a);
#pragma unroll 1
  for (int l = 1; l < hidden_layers; ++l) hidden_layer<kWidth>(consumer, type, activation, a, a);
  consumer.multiply(type, a, heads);
}

// ---- A thread's fragment of a tile ----

MOPO_DEVICE bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Sum over the four threads that share a row.
MOPO_DEVICE float quad_sum(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

// A thread's fragment of the tile: dimensions q, 4 + q, 8 + q, ... of the rows row(0) and row(1), eight
// apart.
template <class T, int kObsSlots>
struct Fragment {
  static constexpr int kPolicySteps = round_up(kObsSlots, 4) / 4;
  static constexpr int kInputSteps = round_up(kObsSlots + kActionSlots, 4) / 4;
  static constexpr T kType{};
  static_assert(kInputSteps <= kMaxInputSteps);

  const RolloutLaunch& args;
  const int q;
  float2*
      predictions;  // (mean, variance) [members][kObsSlots][2 rows]; consecutive ones lie kConsumers apart
  int first_row = 0;
  int t = 0;
  uint32_t alive = 0;  // bit h: row(h) goes on

  MOPO_DEVICE int row(int half) const { return first_row + 8 * half; }
  MOPO_DEVICE bool exists(int half) const { return row(half) < args.batch; }
  MOPO_DEVICE bool is_alive(int half) const { return alive >> half & 1; }
  MOPO_DEVICE int64_t record(int half) const { return int64_t{row(half)} * args.horizon + t; }
  MOPO_DEVICE float2& prediction(int member, int d, int half) const {
    return predictions[((member * kObsSlots + d / 4) * 2 + half) * kConsumers];
  }
  MOPO_DEVICE int64_t number(int half) const { return exists(half) ? args.rows[row(half)] : 0; }
  MOPO_DEVICE PhiloxBlock random(int64_t number, PhiloxStream stream, uint32_t block) const {
    return random_block(number, args.first_step + t, stream, block, args.seed);
  }

  MOPO_DEVICE float observation(int d, int half) const {
    if (d >= args.obs_dim || !is_alive(half)) return 0.0f;
    const float* from = t == 0 ? args.start + int64_t{row(half)} * args.obs_dim
                               : args.record.next_observations + (record(half) - 1) * args.obs_dim;
    return from[d];
  }

  MOPO_DEVICE float standardised(float x, int input) const {
    return (x - args.input_mean[input]) / args.input_std[input];
  }

  // Packs slots of inputs as the operand a: of each k-step's four slots, pairs 0 and 1 are the first two of
  // row(0) and row(1), pairs 2 and 3 the others.
  template <int kSteps, class Value>
  MOPO_DEVICE static void pack_inputs(uint32_t (&a)[kSteps][4], Value value) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * s + i / 2 * 2;
        a[s][i] = ptx::pack(kType, value(at, i % 2), value(at + 1, i % 2));
      }
  }

  MOPO_DEVICE void act(Consumer& consumer, float (&actions)[kActionSlots][2]) const {
    float heads[8 * kActionSlots / 2];
    if (args.policy_hidden_layers > 0) {
      uint32_t inputs[kPolicySteps][4];
      pack_inputs(inputs,
                  [&](int at, int half) { return at < kObsSlots ? observation(4 * at + q, half) : 0.0f; });
      network<kPolicyWidth>(consumer, kType, args.policy_activation, args.policy_hidden_layers, inputs,
                            heads);
    }
#pragma unroll
    for (int at = 0; at < kActionSlots; ++at)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = 4 * at + q;
        const bool taken = d < args.act_dim && is_alive(half);
        float& recorded = args.record.actions[record(half) * args.act_dim + d];
        float action = 0.0f;
        if (args.policy_hidden_layers == 0) {
          if (taken) action = recorded;
        } else {
          action = heads[4 * at + 2 * half];
          if (!args.mean_actions)
            action = SquashedGaussian(action, heads[4 * at + 2 * half + 1], args.log_std_min,
                                      args.log_std_max, normal(random(number(half), kActionStream, at), q))
                         .raw;
          action = tanhf(action);
          if (taken) recorded = action;
        }
        actions[at][half] = action;
      }
  }

  // Stores a member's means and bounded variances.
  MOPO_DEVICE void predict(int member, const float (&heads)[4 * kObsSlots]) const {
#pragma unroll
    for (int at = 0; at < kObsSlots; ++at) {
      const int d = 4 * at + q, dims = args.obs_dim + 1;
      if (d >= dims) continue;
      const float exp_minus_max = args.exp_minus_max[member * dims + d];
      const float exp_min = args.exp_min[member * dims + d];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float mean = heads[4 * at + 2 * half];
        float variance = soft_clamp_variance(expf(-heads[4 * at + 2 * half + 1]), exp_minus_max, exp_min);
        if (args.log_std) variance *= variance;
        prediction(member, d, half) = {mean, variance};
        if (args.mean != nullptr && exists(half)) {
          const int64_t to = (int64_t{member} * args.batch + row(half)) * dims + d;
          args.mean[to] = mean;
          args.std[to] = sqrtf(variance);
        }
      }
    }
  }

  // Draws a member, which it returns, and a sample of the member's Gaussian.
  MOPO_DEVICE int draw(int half, float (&samples)[kObsSlots]) const {
    const int64_t row_number = number(half);
    const uint32_t step = args.keep_member ? 0 : args.first_step + t;
    const uint32_t word = random_block(row_number, step, kMemberStream, 0, args.seed).word[0];
    const uint32_t elite = choose(word, args.num_elites);
    const int member = static_cast<int>(args.elites[elite]);
#pragma unroll
    for (int at = 0; at < kObsSlots; ++at) {
      const int d = 4 * at + q;
      const float2 gaussian = d <= args.obs_dim ? prediction(member, d, half) : float2{0.0f, 0.0f};
      samples[at] = gaussian.x + sqrtf(gaussian.y) * normal(random(row_number, kNoiseStream, at), q);
    }
    return member;
  }

  // For deterministic rollouts: the mean of all members' means. Returns -1, for no member.
  MOPO_DEVICE int average(int half, float (&samples)[kObsSlots]) const {
#pragma unroll
    for (int at = 0; at < kObsSlots; ++at) {
      const int d = 4 * at + q;
      samples[at] = 0.0f;
      for (int member = 0; d <= args.obs_dim && member < args.members; ++member)
        samples[at] += prediction(member, d, half).x;
      samples[at] /= static_cast<float>(args.members);
    }
    return -1;
  }

  // Penalty, sample, termination and record of one row.
  MOPO_DEVICE void finish(int half) {
    const bool on = is_alive(half);
    const int obs_dim = args.obs_dim;
    const float penalty = penalise<float>(
        args.penalty, args.num_penalty_members, obs_dim,
        [&](int i, int d) { return prediction(args.penalty_members[i], d, half).x; },
        [&](int i, int d) { return prediction(args.penalty_members[i], d, half).y; }, q, 4, quad_sum);
    float samples[kObsSlots];
    const int drawn = args.deterministic ? average(half, samples) : draw(half, samples);
    float raw_reward = 0.0f, not_finite = 0.0f, outside = 0.0f;
#pragma unroll
    for (int at = 0; at < kObsSlots; ++at) {
      const int d = 4 * at + q;
      if (d == obs_dim) raw_reward = samples[at];
      if (!on || d >= obs_dim) continue;
      const float x = observation(d, half) * args.carry[d] + samples[at];
      args.record.next_observations[record(half) * obs_dim + d] = x;
      not_finite += !is_finite(x);
      outside += !(x >= args.low[d] && x <= args.high[d]);
    }
    raw_reward = quad_sum(raw_reward);
    const float reward = raw_reward - args.penalty_coef * penalty;
    not_finite = quad_sum(not_finite) + !is_finite(reward);
    bool terminal = quad_sum(outside) + not_finite > 0.0f;
    const bool truncated = penalty > args.truncation.at && not_finite == 0.0f;
    const bool halted = truncated && args.truncation.halts;
    terminal |= halted;
    if (!on) return;
    if (terminal || truncated) alive &= ~(1u << half);
    if (q > 0) return;
    const int64_t at = record(half);
    args.record.rewards[at] = halted ? args.truncation.reward : reward;
    args.record.raw_rewards[at] = raw_reward;
    args.record.penalties[at] = penalty;
    args.record.terminals[at] = terminal;
    args.record.members[at] = drawn;
    args.record.lengths[row(half)] = t + (not_finite == 0.0f);
    args.record.cut[row(half)] = not_finite > 0.0f ? 1 : 2 * truncated;
  }

  template <int kWidth>
  MOPO_DEVICE void step(Consumer& consumer) {
    float actions[kActionSlots][2];
    act(consumer, actions);
    uint32_t inputs[kInputSteps][4];
    pack_inputs(inputs, [&](int at, int half) {
      const int d = 4 * at + q, action = d - 4 * kObsSlots;
      if (at < kObsSlots) return d < args.obs_dim ? standardised(observation(d, half), d) : 0.0f;
      if (at >= kObsSlots + kActionSlots || action >= args.act_dim) return 0.0f;
      return standardised(actions[at - kObsSlots][half], args.obs_dim + action);
    });
    // The inputs wait in shared memory, kConsumers words apart, and leave the registers to the products.
    unsigned char* behind_ring = ptx::dynamic_shared() + kStages * kStageBytes + kBarrierBytes;
    uint32_t* kept = reinterpret_cast<uint32_t*>(behind_ring) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4 * kInputSteps; ++i) kept[i * kConsumers] = inputs[i / 4][i % 4];
#pragma unroll 1
    for (int member = 0; member < args.members; ++member) {
#pragma unroll
      for (int i = 0; i < 4 * kInputSteps; ++i) inputs[i / 4][i % 4] = kept[i * kConsumers];
      float heads[4 * kObsSlots];
      network<kWidth>(consumer, kType, args.activation, args.hidden_layers, inputs, heads);
      predict(member, heads);
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) finish(half);
  }
};

template <class T, int kWidth, int kObsSlots>
MOPO_DEVICE void consume(const RolloutLaunch& args) {
  const int thread = threadIdx.x;
  Consumer consumer{thread / ptx::kWarpgroup};
  float2* predictions = reinterpret_cast<float2*>(args.scratch) + thread +
                        blockIdx.x * args.members * (2 * kObsSlots * kConsumers);
  Fragment<T, kObsSlots> fragment{args, thread % 4, predictions};
  consumer.start_turns();
  fragment.first_row = first_tile() + thread / 32 * 16 + thread % 32 / 4;
  for (; is_tile(fragment.first_row, args.batch); fragment.first_row += next_tile()) {
    fragment.alive = fragment.exists(0) + 2 * fragment.exists(1);
    for (fragment.t = 0; fragment.t < args.horizon; ++fragment.t) fragment.template step<kWidth>(consumer);
  }
  consumer.end_turns();
}

template <class T, int kWidth, int kObsSlots>
__global__ void __launch_bounds__(kThreads, 1) rollout_kernel(const __grid_constant__ RolloutLaunch args) {
  if (threadIdx.x == 0) init_ring();
  ptx::cluster_sync();
  if (threadIdx.x >= kConsumers) {
    ptx::fewer_registers<24>();
    if (threadIdx.x == kConsumers) produce(args);
    __syncwarp();
  } else {
    ptx::more_registers<240>();
    consume<T, kWidth, kObsSlots>(args);
  }
  // Until then the other block may write into this one's shared memory.
  ptx::cluster_sync();
}

template <class T>
cudaError_t launch(const RolloutLaunch& args, int width, int slots, cudaStream_t cuda_stream) {
  const bool narrow = width == 200;
  const auto kernel = slots == 5 ? (narrow ? rollout_kernel<T, 200, 5> : rollout_kernel<T, 256, 5>)
                                 : (narrow ? rollout_kernel<T, 200, 8> : rollout_kernel<T, 256, 8>);
  return ptx::launch<kCluster>(kernel, args.blocks, kThreads, kSharedBytes, cuda_stream, args);
}

}  // namespace mopo::cuda
