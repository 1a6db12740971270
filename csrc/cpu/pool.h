// Threads that live as long as the process.
#pragma once

#include <functional>

#include "interrupt.h"

namespace mopo {

// Runs body(0) on the calling thread and body(1) .. body(count - 1) on others; returns when all are done.
// While it waits, the calling thread looks for interrupts. Any thread may call, a body too: such calls run
// side by side. `body` must not throw. Throws std::system_error if a thread cannot be started; no body has
// run then.
void parallel(int count, const std::function<void(int)>& body, Interrupt& interrupt);

}  // namespace mopo
