// The watchdog of builds with MOPO_FAST_WATCHDOG: a wait of two seconds ends its kernel with an error, and at
// its end the process prints which warps waited for what. Warps write this to the host's memory, which
// outlives the error. All of it is PTX: printf, or a branch in C++, would make ptxas serialise the rollout's
// products (wgmma).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace mopo::watchdog {

// A wait that did not end: for the phase of parity `awaited` of the barrier at this address of shared memory;
// or, if `barrier` is kBlocks, for `awaited` blocks, of which `seen` have arrived.
struct alignas(16) Wait {
  uint32_t barrier, awaited, seen, is_set;
};
// Stands for the blocks' counter in global memory; no address of shared memory is as large.
constexpr uint32_t kBlocks = ~0u;
constexpr int kMostBlocks = 1024, kWarps = 16;

inline Wait (&waits()) [kMostBlocks][kWarps] {
  alignas(4096) static Wait all[kMostBlocks][kWarps] = {};
  return all;
}

inline void print() {
  for (int block = 0; block < kMostBlocks; ++block)
    for (int warp = 0; warp < kWarps; ++warp) {
      const auto [barrier, awaited, seen, is_set] = waits()[block][warp];
      if (is_set == 0) continue;
      std::fprintf(stderr, "mopo_fast: block %d, warp %d waits for ", block, warp);
      if (barrier == kBlocks)
        std::fprintf(stderr, "arrival %u at the blocks' counter, %u have come\n", awaited, seen);
      else
        std::fprintf(stderr, "phase %u of the barrier at byte %u of shared memory\n", awaited, barrier);
    }
}

// Maps waits() for the device, once a process: a second registration would fail.
inline cudaError_t share() {
  static const cudaError_t shared = [] {
    const cudaError_t error = cudaHostRegister(waits(), sizeof waits(), cudaHostRegisterMapped);
    if (error == cudaSuccess) std::atexit(print);
    return error;
  }();
  return shared;
}

}  // namespace mopo::watchdog

// The device's address of waits(), one variable in each source file. The PTX below names it.
extern "C" {
__device__ mopo::watchdog::Wait* mopo_fast_waits;
}

namespace mopo::watchdog {

// Sets mopo_fast_waits for this device and source file. Called before every launch.
static cudaError_t begin() {
  void* address = nullptr;
  cudaError_t error = share();
  if (error == cudaSuccess) error = cudaHostGetDevicePointer(&address, waits(), 0);
  return error == cudaSuccess ? cudaMemcpyToSymbol(mopo_fast_waits, &address, sizeof address) : error;
}

}  // namespace mopo::watchdog

// PTX that repeats `try_once` until that sets `done`; it may set `seen`. %0 is Wait::barrier, %1
// Wait::awaited. After two seconds the wait is written to waits(); a tenth of a second later the kernel
// traps, by when the other waiting warps have written theirs.
#define MOPO_WATCHED(try_once)                           \
  "{\n"                                                  \
  ".reg .pred done;\n"                                   \
  ".reg .u32 began, now, seen, place;\n"                 \
  ".reg .u64 to;\n"                                      \
  "mov.u32 seen, 0;\n"                                   \
  "mov.u32 began, %%globaltimer_lo;\n"                   \
  "again:\n" try_once                                    \
  "@done bra finished;\n"                                \
  "mov.u32 now, %%globaltimer_lo;\n"                     \
  "sub.u32 now, now, began;\n"                           \
  "setp.lt.u32 done, now, 2000000000;\n"                 \
  "@done bra again;\n"                                   \
  "mov.u32 place, %%ctaid.x;\n"                          \
  "min.u32 place, place, 1023;\n"                        \
  "mov.u32 now, %%tid.x;\n"                              \
  "shr.u32 now, now, 5;\n"                               \
  "mad.lo.u32 place, place, 16, now;\n"                  \
  "ld.global.u64 to, [mopo_fast_waits];\n"               \
  "mad.wide.u32 to, place, 16, to;\n"                    \
  "st.volatile.global.v4.u32 [to], {%0, %1, seen, 1};\n" \
  "fence.sc.sys;\n"                                      \
  "others:\n"                                            \
  "mov.u32 now, %%globaltimer_lo;\n"                     \
  "sub.u32 now, now, began;\n"                           \
  "setp.lt.u32 done, now, 2100000000;\n"                 \
  "@done bra others;\n"                                  \
  "trap;\n"                                              \
  "finished:\n"                                          \
  "}"
