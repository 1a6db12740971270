// A machine that runs the Hopper kernels of csrc/cuda on a CPU, so that they can be tested without a GPU.
//
// The .cu files are compiled by the host's C++ compiler with this folder first on the include path, where
// cuda_runtime.h and the like make CUDA C++ out of C++, and cuda/ptx.cuh stands for csrc/cuda/ptx.cuh.
//
// How it runs: every CUDA thread is a fiber that runs until it waits; the blocks of a cluster run together,
// cluster after cluster, or all blocks of a cooperative launch. A scheduler picks who is next, and when what
// is asynchronous happens: by MOPO_EMULATOR_SEED, 0 for in turn and as late as possible, else at random, some
// warps or warpgroups before others (schedule.h). What PTX leaves undefined is an error with a text, which
// the launch returns as a CUDA error, or shows as NaN:
// - Shared memory starts as NaN, and a bulk copy makes its destination NaN until its bytes land, later, in
//   pieces, each counted at the barrier as it lands (copies.cpp).
// - A product reads a and d when it is issued, b at any time until a wait; d is NaN in between. All threads
//   of the warpgroup must issue the same. b must have been brought by bulk copies that its threads have
//   waited for, themselves or through others, and a copy onto it must come from one who knows that the
//   product is done: this is followed through all that threads wait for, so no schedule hides it
//   (products.cpp).
// - Barriers count arrivals and bytes as PTX's mbarrier does, named barriers threads, __syncthreads and
//   cluster_sync all that have not ended; registers come from a pool (barriers.cpp).
// - Nobody can run and nothing is on its way: a deadlock, told with who waits for what.
// - Threads that end while products or copies are in flight, and a block that is reached after its end.
//
// What it cannot show: time; the order in which a real memory shows writes to others (here at once); writes
// of threads to shared memory that race with each other, but by a seed that makes them matter; what the
// compiler does to registers (keep() does nothing here); how a tensor core rounds its sums; and where a real
// Hopper differs from the PTX ISA or from its reading here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace mopo::emulator {

// ---- What ptx.cuh offers to a kernel; each is described there ----

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

// Of the device: MOPO_EMULATOR_MULTIPROCESSORS, or 4.
int multiprocessors();

cudaError_t launch(const std::function<void()>& kernel, int cluster, int blocks, int threads, int shared);
cudaError_t launch_together(const std::function<void()>& kernel, int blocks, int threads, int shared);

}  // namespace mopo::emulator
