// A pool of threads that lives as long as the process.
#pragma once

#include <functional>

#include "interrupt.h"

namespace mopo {

// Runs body(0) on the calling thread and body(1) .. body(count - 1) on others; returns when all have. A
// thread that waits for the others looks for interrupts. Calls may come from several threads, and from within
// a body, side by side. `body` must not throw.
void parallel(int count, const std::function<void(int)>& body, Interrupt& interrupt);

}  // namespace mopo
