// PTX instructions as functions, most of them Hopper's: all that the kernels use beyond CUDA C++. No other
// file but watchdog.cuh has inline PTX. Source: the PTX ISA, "Asynchronous warpgroup level matrix
// instructions" and "mbarrier".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common.h"
#ifdef MOPO_FAST_WATCHDOG
#include "cuda/watchdog.cuh"
#endif

namespace mopo::ptx {

// Threads of a warpgroup, which multiplies together: four warps, the first one's number a multiple of four.
constexpr int kWarpgroup = 128;

MOPO_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The block's dynamic shared memory, of the size given at the launch.
MOPO_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// ---- Barriers in shared memory: a phase ends when `count` threads and all expected bytes have arrived ----

struct SharedBarrier {
  uint64_t word;
};

MOPO_DEVICE void barrier_init(SharedBarrier* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// Called after the last barrier_init and before the cluster_sync after which other threads use the barriers.
MOPO_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and lets the phase wait for `bytes` of bulk copies too.
MOPO_DEVICE void barrier_arrive_expect(SharedBarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Arrives at the barrier in the same place of the cluster's block `rank`. It orders only this block's
// accesses to its own shared memory: a release to the cluster would wait for all stores under way to the
// second-level cache.
MOPO_DEVICE void barrier_arrive_at(SharedBarrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity has ended; a barrier begins in phase 0. Not an acquire from the
// cluster, which would empty the first-level cache.
MOPO_DEVICE void barrier_wait(SharedBarrier* barrier, uint32_t parity) {
#ifdef MOPO_FAST_WATCHDOG
  asm volatile(MOPO_WATCHED("mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n")::"r"(
                   shared_address(barrier)),
               "r"(parity)
               : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- Clusters of blocks ----

MOPO_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of all blocks of the cluster.
MOPO_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Copies `bytes` (a multiple of 16, aligned to 16) to the same place in every block of the mask `blocks`, and
// counts them at the barrier in the same place of each.
MOPO_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, SharedBarrier* barrier,
                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// ---- Named barriers 1 to 15; `threads` counts those that wait and those that only arrive ----

MOPO_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

MOPO_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Registers per thread: called by all threads of a warpgroup, with a multiple of 8 ----

template <int kCount>
MOPO_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
MOPO_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Products of a warpgroup: d [64, N] += a [64, 16] b [16, N], in the background ----
//
// d: thread t holds, for each block j of 8 columns, d[4 j] and d[4 j + 1] at row r = 16 (t / 32) + t % 32 / 4
// and columns 8 j + 2 (t % 4) + {0, 1}; d[4 j + 2] and d[4 j + 3] at row r + 8. a: each register is a pair of
// columns 2 (t % 4) + {0, 1}: a[0] at row r, a[1] at row r + 8, a[2] and a[3] the same eight columns further
// on. b: in shared memory, in cores of 8 columns by 8 rows, each core [column][row] in 128 contiguous bytes.

// The descriptor of a b whose cores lie `rows_apart` bytes apart from eight rows to the next, and
// `columns_apart` from eight columns to the next.
MOPO_DEVICE uint64_t matrix(const void* shared, uint32_t rows_apart, uint32_t columns_apart) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(rows_apart >> 4) << 16 | static_cast<uint64_t>(columns_apart >> 4) << 32;
}

// The descriptor of the matrix `bytes` (a multiple of 16) behind another of the same layout.
MOPO_DEVICE uint64_t behind(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

// Called before the first product, and whenever registers of d or a have been written since the last product.
MOPO_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes all products since the last call one group.
MOPO_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last kPending. Then their b may be overwritten and, if kPending is 0, their d
// read.
template <int kPending>
MOPO_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to an accumulator across the wait for the products into it.
template <int kCount>
MOPO_DEVICE void keep(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define MOPO_D1(i) "%" #i
#define MOPO_D10(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define MOPO_R1(i) "+f"(d[i])
#define MOPO_R10(t)                                                                                        \
  MOPO_R1(t##0), MOPO_R1(t##1), MOPO_R1(t##2), MOPO_R1(t##3), MOPO_R1(t##4), MOPO_R1(t##5), MOPO_R1(t##6), \
      MOPO_R1(t##7), MOPO_R1(t##8), MOPO_R1(t##9)
// Operands: d's columns / 2 registers, a's four, b's descriptor.
#define MOPO_PRODUCT(columns, type, outputs, a0, a1, a2, a3, b, ...)                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" outputs \
               "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"                   \
               : __VA_ARGS__                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix)                          \
               : "memory")
#define MOPO_PRODUCTS(columns, outputs, a0, a1, a2, a3, b, ...)                                             \
  MOPO_DEVICE void multiply_add(__half, float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t matrix) { \
    MOPO_PRODUCT(columns, "f16", outputs, a0, a1, a2, a3, b, __VA_ARGS__);                                  \
  }                                                                                                         \
  MOPO_DEVICE void multiply_add(__nv_bfloat16, float (&d)[columns / 2], const uint32_t (&a)[4],             \
                                uint64_t matrix) {                                                          \
    MOPO_PRODUCT(columns, "bf16", outputs, a0, a1, a2, a3, b, __VA_ARGS__);                                 \
  }

// multiply_add(type of a and b, d, a, descriptor of b): starts d += a b.
MOPO_PRODUCTS(16, "%0,%1,%2,%3,%4,%5,%6,%7", 8, 9, 10, 11, 12, MOPO_R1(0), MOPO_R1(1), MOPO_R1(2), MOPO_R1(3),
              MOPO_R1(4), MOPO_R1(5), MOPO_R1(6), MOPO_R1(7))
MOPO_PRODUCTS(40, MOPO_D10() "," MOPO_D10(1), 20, 21, 22, 23, 24, MOPO_R10(), MOPO_R10(1))
MOPO_PRODUCTS(64, MOPO_D10() "," MOPO_D10(1) "," MOPO_D10(2) "," MOPO_D1(30) "," MOPO_D1(31), 32, 33, 34, 35,
              36, MOPO_R10(), MOPO_R10(1), MOPO_R10(2), MOPO_R1(30), MOPO_R1(31))
MOPO_PRODUCTS(200,
              MOPO_D10() "," MOPO_D10(1) "," MOPO_D10(2) "," MOPO_D10(3) "," MOPO_D10(4) "," MOPO_D10(
                  5) "," MOPO_D10(6) "," MOPO_D10(7) "," MOPO_D10(8) "," MOPO_D10(9),
              100, 101, 102, 103, 104, MOPO_R10(), MOPO_R10(1), MOPO_R10(2), MOPO_R10(3), MOPO_R10(4),
              MOPO_R10(5), MOPO_R10(6), MOPO_R10(7), MOPO_R10(8), MOPO_R10(9))
MOPO_PRODUCTS(256,
              MOPO_D10() "," MOPO_D10(1) "," MOPO_D10(2) "," MOPO_D10(3) "," MOPO_D10(4) "," MOPO_D10(
                  5) "," MOPO_D10(6) "," MOPO_D10(7) "," MOPO_D10(8) "," MOPO_D10(9) "," MOPO_D10(
                  10) "," MOPO_D10(11) "," MOPO_D1(120) "," MOPO_D1(121) "," MOPO_D1(122) "," MOPO_D1(
                  123) "," MOPO_D1(124) "," MOPO_D1(125) "," MOPO_D1(126) "," MOPO_D1(127),
              128, 129, 130, 131, 132, MOPO_R10(), MOPO_R10(1), MOPO_R10(2), MOPO_R10(3), MOPO_R10(4),
              MOPO_R10(5), MOPO_R10(6), MOPO_R10(7), MOPO_R10(8), MOPO_R10(9), MOPO_R10(10), MOPO_R10(11),
              MOPO_R1(120), MOPO_R1(121), MOPO_R1(122), MOPO_R1(123), MOPO_R1(124), MOPO_R1(125),
              MOPO_R1(126), MOPO_R1(127))

#undef MOPO_PRODUCTS
#undef MOPO_PRODUCT
#undef MOPO_R10
#undef MOPO_R1
#undef MOPO_D10
#undef MOPO_D1

// ---- Single instructions ----

// The hardware's tanh, with a relative error of 2^-11 at most.
MOPO_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x, within two units in the last place.
MOPO_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A pair of a's columns: two numbers rounded to nearest, `low` in the lower half.
MOPO_DEVICE uint32_t pack(__half, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

MOPO_DEVICE uint32_t pack(__nv_bfloat16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The value of the lane whose number is this one's xor `mask`. All lanes of the warp call it.
MOPO_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// The same pointer, which the compiler now knows to point to global memory.
template <class T>
MOPO_DEVICE T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// ---- Blocks that run together and wait for one another, by a counter in global memory ----

// Called by one thread after a __syncthreads: whoever sees the count sees all that the block has written.
MOPO_DEVICE void arrive(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits until `count` blocks have arrived, modulo 2^32.
MOPO_DEVICE void wait_for(const uint32_t* counter, uint32_t count) {
#ifdef MOPO_FAST_WATCHDOG
  asm volatile(MOPO_WATCHED("ld.acquire.gpu.global.u32 seen, [%2];\n"
                            "sub.u32 now, seen, %1;\n"
                            "setp.ge.s32 done, now, 0;\n")::"r"(watchdog::kBlocks),
               "r"(count), "l"(counter)
               : "memory");
#else
  uint32_t arrived;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
  while (static_cast<int32_t>(arrived - count) < 0);
#endif
}

// ---- Launching ----

// Launches kernel(args) on `blocks` blocks in clusters of kCluster, each with `shared` bytes of dynamic
// shared memory.
template <int kCluster, class Args>
cudaError_t launch(void (*kernel)(Args), int blocks, int threads, int shared, cudaStream_t cuda_stream,
                   const Args& args) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
#ifdef MOPO_FAST_WATCHDOG
  if (error == cudaSuccess) error = watchdog::begin();
#endif
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = cuda_stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Launches kernel(args) on `blocks` blocks that all run at the same time; an error if the device has not the
// room.
template <class Args>
cudaError_t launch_together(void (*kernel)(Args), int blocks, int threads, int shared,
                            cudaStream_t cuda_stream, const Args& args) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
#ifdef MOPO_FAST_WATCHDOG
  if (error == cudaSuccess) error = watchdog::begin();
#endif
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = cuda_stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace mopo::ptx
