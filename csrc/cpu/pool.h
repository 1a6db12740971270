// A pool of threads that lives as long as the process.
#pragma once

#include <functional>

#include "interrupt.h"

namespace mopo {

// Runs body(0) on the calling thread and body(1) .. body(count - 1) on others, and returns when all are done.
// While it waits for the others, the calling thread looks for interrupts. Several threads may call at once,
// and a body may call again: these calls run side by side. `body` must not throw.
void parallel(int count, const std::function<void(int)>& body, Interrupt& interrupt);

}  // namespace mopo
