// A machine that runs the Hopper kernels of csrc/cuda on a CPU, so that they can be tested without a GPU.
//
// The .cu files are compiled by the host's C++ compiler with this folder first on the include path, where
// cuda_runtime.h and the like make CUDA C++ out of C++, and cuda/ptx.cuh stands for csrc/cuda/ptx.cuh.
//
// Every CUDA thread is a fiber that runs until it waits. The blocks of a cluster run together, cluster after
// cluster, or all blocks of a cooperative launch. A scheduler picks the next thread and the times of
// asynchronous work. With MOPO_EMULATOR_SEED=0 threads run in turn and asynchronous work is done as late as
// possible; any other seed makes both random, with some warps or warpgroups before others (schedule.h).
// Behaviour that PTX leaves undefined becomes an error with a text, which the launch returns as a CUDA error,
// or a NaN:
// - Shared memory starts as NaN, and a bulk copy makes its destination NaN until its bytes land, later, in
//   pieces, each counted at the barrier as it lands (copies.cpp).
// - A product reads a and d when it is issued, b at any time until a wait; d is NaN in between. All threads
//   of the warpgroup must issue the same product. Its threads must have waited, directly or through other
//   threads, for the bulk copies that brought b; and a thread that copies onto b must know by its waits that
//   the product is done. Vector clocks follow all waits, so that no schedule hides an error (products.cpp).
// - Barriers count arrivals and bytes as PTX's mbarrier does; named barriers count threads; __syncthreads and
//   cluster_sync wait for all threads that have not ended; registers come from a pool (barriers.cpp).
// - A deadlock, in which no thread can run and nothing is on its way, is an error that lists the waits.
// - So are a thread that ends while its products or copies are in flight, and an access to an ended block.
//
// The emulator cannot show: time; the order in which a real memory makes writes visible (here at once); races
// between threads' writes to shared memory, unless a seed makes them matter; the compiler's use of registers
// (keep() does nothing here); the rounding of a tensor core's sums; and differences between a real Hopper and
// the PTX ISA, or the reading of the ISA here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace mopo::emulator {

// ---- The functions behind ptx.cuh, where each is described ----

struct SharedBarrier {
  uint64_t word;
};

enum class Operands { kHalf, kBfloat16 };
constexpr Operands operands(__half) { return Operands::kHalf; }
constexpr Operands operands(__nv_bfloat16) { return Operands::kBfloat16; }

uint32_t shared_address(const void* pointer);
unsigned char* dynamic_shared();
uint32_t cluster_rank();
void cluster_sync();
float shuffle_xor(float x, int mask);

void barrier_init(SharedBarrier* barrier, uint32_t count);
void fence_barrier_init();
void barrier_arrive_expect(SharedBarrier* barrier, uint32_t bytes);
void barrier_arrive_at(SharedBarrier* barrier, uint32_t rank);
void barrier_wait(SharedBarrier* barrier, uint32_t parity);
void named_sync(int id, int threads);
void named_arrive(int id, int threads);
void arrive(uint32_t* counter);
void wait_for(const uint32_t* counter, uint32_t count);
void more_registers(int count);
void fewer_registers(int count);

void bulk_load(void* shared, const void* global, uint32_t bytes, SharedBarrier* barrier, uint16_t blocks);

void products_begin();
void multiply_add(Operands type, float* d, int count, const uint32_t (&a)[4], uint64_t matrix);
void products_commit();
void products_wait(int pending);

float tanh_approx(float x);
float exp2_approx(float x);
uint32_t pack(Operands type, float low, float high);

// The device's multiprocessors: MOPO_EMULATOR_MULTIPROCESSORS, or 4.
int multiprocessors();

cudaError_t launch(const std::function<void()>& kernel, int cluster, int blocks, int threads, int shared);
cudaError_t launch_together(const std::function<void()>& kernel, int blocks, int threads, int shared);

}  // namespace mopo::emulator
