// Small kernels for the tests of the emulator: each shows one thing that a GPU does and the emulator has to
// do too.
#include <vector>

#include "cuda/ptx.cuh"

namespace mopo {
namespace {

using ptx::SharedBarrier;

// Factors of a product: a [64, 16 steps] and d [64, columns], row-major; b as images of 16 rows, one for each
// step.
struct ProductArgs {
  const float* a;
  const unsigned char* b;
  float* d;
  int steps;
};

// Position of a thread's registers d[4 j + 2 i], d[4 j + 2 i + 1] in a row-major matrix.
__device__ int place(int j, int i, int columns) {
  const int thread = threadIdx.x % ptx::kWarpgroup;
  return (16 * (thread / 32) + thread % 32 / 4 + 8 * i) * columns + 8 * j + 2 * (thread % 4);
}

template <class T>
__device__ void load_a(const float* a, int width, int step, uint32_t (&registers)[4]) {
  for (int i = 0; i < 4; ++i) {
    const float* pair = a + place(2 * step + i / 2, i % 2, width);
    registers[i] = ptx::pack(T{}, pair[0], pair[1]);
  }
}

template <int kColumns>
__device__ void load_d(const float* from, float (&d)[kColumns / 2]) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = from[place(i / 4, i / 2 % 2, kColumns) + i % 2];
}

template <int kColumns>
__device__ void store_d(const float (&d)[kColumns / 2], float* to) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) to[place(i / 4, i / 2 % 2, kColumns) + i % 2] = d[i];
}

// Brings all of b to shared memory and waits for it, in a kernel of one block.
__device__ unsigned char* load_b(const unsigned char* b, uint32_t bytes) {
  unsigned char* shared = ptx::dynamic_shared();
  auto* barrier = reinterpret_cast<SharedBarrier*>(shared + bytes);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::fence_barrier_init();
    ptx::barrier_arrive_expect(barrier, bytes);
    ptx::bulk_load(shared, b, bytes, barrier, 1);
  }
  __syncthreads();
  ptx::barrier_wait(barrier, 0);
  return shared;
}

// d += a b, with d [columns / 2][128] and a [steps][4][128] in the order of the threads' registers.
template <class T, int kColumns>
__global__ void __launch_bounds__(128) product_kernel(const __grid_constant__ ProductArgs args) {
  constexpr uint32_t kImage = 32 * kColumns;
  const unsigned char* b = load_b(args.b, args.steps * kImage);
  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = args.d[128 * i + threadIdx.x];
#pragma unroll 1
  for (int step = 0; step < args.steps; ++step) {
    const float* pairs = args.a + 128 * 4 * step + threadIdx.x;
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(pairs[128 * i]);
    ptx::keep(d);
    ptx::products_begin();
    ptx::multiply_add(T{}, d, a, ptx::matrix(b + step * kImage, 16 * kColumns, 128));
    ptx::products_commit();
    ptx::products_wait<0>();
    ptx::keep(d);
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) args.d[128 * i + threadIdx.x] = d[i];
}

// d += relu(a b) b, of 64 columns and 4 steps: an accumulator becomes the next product's a. The products form
// two groups, to wait for one of them alone.
template <class T>
__global__ void __launch_bounds__(128) chain_kernel(const __grid_constant__ ProductArgs args) {
  constexpr uint32_t kImage = 32 * 64;
  const unsigned char* b = load_b(args.b, 4 * kImage);
  float hidden[32] = {}, d[32];
  uint32_t a[4][4];
  for (int step = 0; step < 4; ++step) load_a<T>(args.a, 64, step, a[step]);
  ptx::products_begin();
  for (int step = 0; step < 4; ++step)
    ptx::multiply_add(T{}, hidden, a[step], ptx::matrix(b + step * kImage, 16 * 64, 128));
  ptx::products_commit();
  ptx::products_wait<0>();
  ptx::keep(hidden);
  load_d<64>(args.d, d);
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[step][i] =
          ptx::pack(T{}, fmaxf(hidden[8 * step + 2 * i], 0.0f), fmaxf(hidden[8 * step + 2 * i + 1], 0.0f));
  ptx::products_begin();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::multiply_add(T{}, d, a[step], ptx::matrix(b + step * kImage, 16 * 64, 128));
    if (step % 2 == 1) ptx::products_commit();
  }
  ptx::products_wait<1>();
  ptx::products_wait<0>();
  ptx::keep(d);
  store_d<64>(d, args.d);
}

// ---- A ring of slots that a cluster's blocks fill for each other, with a fault or without ----

enum Fault : int {
  kNone,
  kNoFullWait,
  kEarlyRelease,
  kOneRelease,
  kExtraRelease,
  kEarlyRead,
  kEarlyWrite,
  kNoBegin,
  kLatePack,
  kNoFence,
  kNoClusterSync,
  kNoFirstTurn,
  kNoLastSync,
  kOtherMatrix,
  kWrittenByThreads,
  kWrongCount,
  kGreedy,
  kFaults
};

constexpr int kSlots = 3, kColumns = 64, kThreads = 3 * ptx::kWarpgroup;
constexpr uint32_t kSlotBytes = 32 * kColumns;

// d [blocks, 2, 64, 64] += a [blocks, 2, 64, 16 steps] b.
template <Fault kFault>
__global__ void __launch_bounds__(kThreads, 1) pipeline_kernel(const __grid_constant__ ProductArgs args) {
  unsigned char* ring = ptx::dynamic_shared();
  auto* full = reinterpret_cast<SharedBarrier*>(ring + kSlots * kSlotBytes);
  SharedBarrier* empty = full + kSlots;
  const int warpgroup = threadIdx.x / ptx::kWarpgroup, thread = threadIdx.x % ptx::kWarpgroup;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      ptx::barrier_init(full + slot, 1);
      ptx::barrier_init(empty + slot, kFault == kWrongCount ? 5 : 4);
    }
    if (kFault != kNoFence) ptx::fence_barrier_init();
  }
  if (kFault == kNoClusterSync)
    __syncthreads();
  else
    ptx::cluster_sync();

  if (warpgroup == 2) {
    ptx::fewer_registers<24>();
    for (int step = 0; step < args.steps && thread == 0; ++step) {
      const int slot = step % kSlots;
      if (step >= kSlots) ptx::barrier_wait(empty + slot, (step / kSlots + 1) % 2);
      ptx::barrier_arrive_expect(full + slot, kSlotBytes);
      const uint32_t half = ptx::cluster_rank() * (kSlotBytes / 2);
      ptx::bulk_load(ring + slot * kSlotBytes + half, args.b + step * kSlotBytes + half, kSlotBytes / 2,
                     full + slot, 3);
    }
  } else {
    ptx::more_registers<kFault == kGreedy ? 248 : 240>();
    const int rows = 64 * (2 * blockIdx.x + warpgroup);
    float d[kColumns / 2];
    load_d<kColumns>(args.d + rows * kColumns, d);
    // The first turn is the first warpgroup's.
    if (warpgroup == 1 && kFault != kNoFirstTurn) ptx::named_arrive(1, 256);
    for (int step = 0; step < args.steps; ++step) {
      const int slot = step % kSlots;
      unsigned char* b = ring + slot * kSlotBytes;
      uint32_t a[4];
      if (kFault != kLatePack) load_a<__half>(args.a + rows * 16 * args.steps, 16 * args.steps, step, a);
      ptx::named_sync(1 + warpgroup, 256);
      if (kFault != kNoFullWait) ptx::barrier_wait(full + slot, step / kSlots % 2);
      if (kFault == kWrittenByThreads && threadIdx.x == 0) b[0] ^= 1;
      ptx::keep(d);
      if (kFault != kNoBegin) ptx::products_begin();
      if (kFault == kLatePack) load_a<__half>(args.a + rows * 16 * args.steps, 16 * args.steps, step, a);
      const uint32_t apart = kFault == kOtherMatrix && thread == 5 ? 256 : 128;
      ptx::multiply_add(__half{}, d, a, ptx::matrix(b, 16 * kColumns, apart));
      ptx::products_commit();
      ptx::named_arrive(2 - warpgroup, 256);
      if (kFault == kEarlyRelease && thread < 2) ptx::barrier_arrive_at(empty + slot, thread);
      const float early = kFault == kEarlyRead ? d[0] : 0.0f;
      if (kFault == kEarlyWrite) d[0] += 1.0f;
      ptx::products_wait<0>();
      ptx::keep(d);
      if (kFault == kEarlyRead) d[0] += 0.0f * early;
      if (kFault != kEarlyRelease && thread < (kFault == kOneRelease ? 1 : 2))
        ptx::barrier_arrive_at(empty + slot, thread);
      if (kFault == kExtraRelease && thread == 0) ptx::barrier_arrive_at(empty + slot, thread);
    }
    store_d<kColumns>(d, args.d + rows * kColumns);
  }
  if (kFault != kNoLastSync) ptx::cluster_sync();
}

template <class T, int kColumns>
cudaError_t product(const ProductArgs& args) {
  return ptx::launch<1>(product_kernel<T, kColumns>, 1, 128, args.steps * 32 * kColumns + 16, nullptr, args);
}

template <class T>
cudaError_t product(int columns, const ProductArgs& args) {
  switch (columns) {
    case 16:
      return product<T, 16>(args);
    case 40:
      return product<T, 40>(args);
    case 64:
      return product<T, 64>(args);
    case 200:
      return product<T, 200>(args);
    case 256:
      return product<T, 256>(args);
    default:
      return cudaErrorInvalidValue;
  }
}

template <int kFault = 0>
cudaError_t pipeline(int fault, int blocks, const ProductArgs& args) {
  if constexpr (kFault == kFaults)
    return cudaErrorInvalidValue;
  else if (fault == kFault)
    return ptx::launch<2>(pipeline_kernel<Fault{kFault}>, blocks, kThreads, kSlots * (kSlotBytes + 16),
                          nullptr, args);
  else
    return pipeline<kFault + 1>(fault, blocks, args);
}

// ---- Warps and single instructions ----

struct WarpArgs {
  const float* x;
  float *sums, *tanh, *exp2;
};

// Sums over four lanes, and the approximate functions.
__global__ void __launch_bounds__(64) warp_kernel(const __grid_constant__ WarpArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = args.x[i];
  for (int mask = 1; mask < 4; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
  __syncwarp();
  args.sums[i] = sum;
  args.tanh[i] = ptx::tanh_approx(args.x[i]);
  args.exp2[i] = ptx::exp2_approx(args.x[i]);
}

// ---- Blocks that wait for one another ----

enum class Company { kWaits, kDoesNotWait, kLacksOne };

struct CompanyArgs {
  Company how;
  uint32_t* counter;
  int* values;  // [blocks], written by each block
  int* sums;    // [blocks], each block's sum of all values
};

__global__ void __launch_bounds__(32) company_kernel(const __grid_constant__ CompanyArgs args) {
  if (threadIdx.x == 0) args.values[blockIdx.x] = 1 + blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (args.how != Company::kLacksOne || blockIdx.x > 0) ptx::arrive(args.counter);
    if (args.how != Company::kDoesNotWait) ptx::wait_for(args.counter, gridDim.x);
    int sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += args.values[block];
    args.sums[blockIdx.x] = sum;
  }
}

// ---- Called by the tests, with arrays on the host. Each function returns "" or an error's text ----

const char* told(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

// Device copies of the host's arrays.
class Arrays {
 public:
  template <class T>
  T* put(T* array, size_t count) {
    const size_t bytes = count * sizeof(T);
    void* copy = nullptr;
    note(cudaMalloc(&copy, bytes));
    if (error_ == cudaSuccess) note(cudaMemcpy(copy, array, bytes, cudaMemcpyHostToDevice));
    copies_.push_back({copy, array, bytes, std::is_const_v<T>});
    return static_cast<T*>(copy);
  }
  bool are_there() const { return error_ == cudaSuccess; }
  // Waits for the kernel, copies back the arrays that it may have written, and returns the first error's
  // text.
  const char* finish(cudaError_t launched) {
    note(launched);
    note(cudaDeviceSynchronize());
    for (const Copy& copy : copies_)
      if (!copy.is_input && error_ == cudaSuccess)
        note(cudaMemcpy(const_cast<void*>(copy.host), copy.device, copy.bytes, cudaMemcpyDeviceToHost));
    for (const Copy& copy : copies_) cudaFree(copy.device);
    return told(error_);
  }

 private:
  struct Copy {
    void* device;
    const void* host;
    size_t bytes;
    bool is_input;
  };
  void note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  std::vector<Copy> copies_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace
}  // namespace mopo

#pragma GCC visibility push(default)
extern "C" {

// a [steps][4][128] words, b [steps][columns] rows of 16, d [columns / 2][128].
const char* run_product(bool bfloat16, int columns, int steps, const float* a, const unsigned char* b,
                        float* d) {
  mopo::Arrays arrays;
  const mopo::ProductArgs args{arrays.put(a, steps * 4 * 128), arrays.put(b, steps * 32 * columns),
                               arrays.put(d, columns / 2 * 128), steps};
  if (!arrays.are_there()) return arrays.finish(cudaSuccess);
  return arrays.finish(bfloat16 ? mopo::product<__nv_bfloat16>(columns, args)
                                : mopo::product<__half>(columns, args));
}

const char* run_chain(bool bfloat16, const float* a, const unsigned char* b, float* d) {
  mopo::Arrays arrays;
  const mopo::ProductArgs args{arrays.put(a, 64 * 64), arrays.put(b, 4 * 32 * 64), arrays.put(d, 64 * 64), 4};
  if (!arrays.are_there()) return arrays.finish(cudaSuccess);
  return arrays.finish(
      mopo::ptx::launch<1>(bfloat16 ? mopo::chain_kernel<__nv_bfloat16> : mopo::chain_kernel<__half>, 1, 128,
                           4 * 32 * 64 + 16, nullptr, args));
}

const char* run_pipeline(int fault, int blocks, int steps, const float* a, const unsigned char* b, float* d) {
  mopo::Arrays arrays;
  const mopo::ProductArgs args{arrays.put(a, blocks * 2 * 64 * 16 * steps),
                               arrays.put(b, steps * mopo::kSlotBytes),
                               arrays.put(d, blocks * 2 * 64 * mopo::kColumns), steps};
  if (!arrays.are_there()) return arrays.finish(cudaSuccess);
  return arrays.finish(mopo::pipeline(fault, blocks, args));
}

const char* run_warps(int blocks, const float* x, float* sums, float* tanh, float* exp2) {
  mopo::Arrays arrays;
  const size_t count = 64 * blocks;
  const mopo::WarpArgs args{arrays.put(x, count), arrays.put(sums, count), arrays.put(tanh, count),
                            arrays.put(exp2, count)};
  if (!arrays.are_there()) return arrays.finish(cudaSuccess);
  return arrays.finish(mopo::ptx::launch<1>(mopo::warp_kernel, blocks, 64, 0, nullptr, args));
}

const char* run_company(int how, int blocks, uint32_t* counter, int* values, int* sums) {
  mopo::Arrays arrays;
  const mopo::CompanyArgs args{mopo::Company{how}, arrays.put(counter, 1), arrays.put(values, blocks),
                               arrays.put(sums, blocks)};
  if (!arrays.are_there()) return arrays.finish(cudaSuccess);
  return arrays.finish(mopo::ptx::launch_together(mopo::company_kernel, blocks, 32, 0, nullptr, args));
}
}
#pragma GCC visibility pop
