// Stands for csrc/cuda/ptx.cuh, which it precedes on the include path: the same functions on the emulated
// machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "machine.h"

namespace mopo::ptx {

constexpr int kWarpgroup = 128;

using emulator::arrive;
using emulator::barrier_arrive_at;
using emulator::barrier_arrive_expect;
using emulator::barrier_init;
using emulator::barrier_wait;
using emulator::bulk_load;
using emulator::cluster_rank;
using emulator::cluster_sync;
using emulator::dynamic_shared;
using emulator::fence_barrier_init;
using emulator::named_arrive;
using emulator::named_sync;
using emulator::products_begin;
using emulator::products_commit;
using emulator::shared_address;
using emulator::SharedBarrier;
using emulator::shuffle_xor;
using emulator::wait_for;

template <int kCount>
void more_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emulator::more_registers(kCount);
}
template <int kCount>
void fewer_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emulator::fewer_registers(kCount);
}

// matrix-descriptor-encode of the PTX ISA, for an address and two distances.
inline uint64_t matrix(const void* shared, uint32_t rows_apart, uint32_t columns_apart) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(rows_apart >> 4) << 16 | static_cast<uint64_t>(columns_apart >> 4) << 32;
}

inline uint64_t behind(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

template <int kPending>
void products_wait() {
  emulator::products_wait(kPending);
}
template <int kCount>
void keep(float (&)[kCount]) {}

template <class T, int kCount>
void multiply_add(T, float (&d)[kCount], const uint32_t (&a)[4], uint64_t matrix) {
  static_assert(kCount % 4 == 0 && kCount <= 128);
  emulator::multiply_add(emulator::operands(T{}), d, kCount, a, matrix);
}

using emulator::exp2_approx;
using emulator::tanh_approx;

template <class T>
uint32_t pack(T, float low, float high) {
  return emulator::pack(emulator::operands(T{}), low, high);
}

template <class T>
T* global(T* pointer) {
  return pointer;
}

template <int kCluster, class Args>
cudaError_t launch(void (*kernel)(Args), int blocks, int threads, int shared, cudaStream_t,
                   const Args& args) {
  return emulator::launch([kernel, &args] { kernel(args); }, kCluster, blocks, threads, shared);
}
template <class Args>
cudaError_t launch_together(void (*kernel)(Args), int blocks, int threads, int shared, cudaStream_t,
                            const Args& args) {
  return emulator::launch_together([kernel, &args] { kernel(args); }, blocks, threads, shared);
}

}  // namespace mopo::ptx
