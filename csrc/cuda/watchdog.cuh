// The watchdog of builds with MOPO_FAST_WATCHDOG: a wait of two seconds ends its kernel with an error. The
// process says at its end which warps waited for what. They write it to the host's memory, which outlives the
// error. printf, or a branch in C++, would make ptxas serialise the rollout's products (wgmma).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace mopo::watchdog {

// A wait that did not end. `barrier`: its address in shared memory, and `awaited` the parity of its phase; or
// kBlocks, of whom `awaited` are waited for and `seen` have come.
struct alignas(16) Wait {
  uint32_t barrier, awaited, seen, is_set;
};
// No address of shared memory: the blocks' counter in global memory.
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

// Once a process: a second registration would fail.
inline cudaError_t share() {
  static const cudaError_t shared = [] {
    const cudaError_t error = cudaHostRegister(waits(), sizeof waits(), cudaHostRegisterMapped);
    if (error == cudaSuccess) std::atexit(print);
    return error;
  }();
  return shared;
}

}  // namespace mopo::watchdog

// The device's address of waits(). PTX finds it by this name; each source file has one.
extern "C" {
__device__ mopo::watchdog::Wait* mopo_fast_waits;
}

namespace mopo::watchdog {

// Tell this device and source file where waits() is. Called before every launch.
static cudaError_t begin() {
  void* address = nullptr;
  cudaError_t error = share();
  if (error == cudaSuccess) error = cudaHostGetDevicePointer(&address, waits(), 0);
  return error == cudaSuccess ? cudaMemcpyToSymbol(mopo_fast_waits, &address, sizeof address) : error;
}

}  // namespace mopo::watchdog

// PTX: `try_once` over and over, until it sets `done`; it may set `seen`. %0 is what is waited for, %1 how
// much of it. After two seconds the wait is written down; a tenth of a second later the kernel ends, so that
// others that wait have written too.
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
