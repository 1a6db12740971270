// A pool of threads that lives as long as the process.
#pragma once

#include <functional>

namespace mopo {

// Runs body(0) .. body(count - 1), each on a thread of its own, the caller's included; returns when all have.
// Calls from several threads take turns. `body` must not throw.
void parallel(int count, const std::function<void(int)>& body);

}  // namespace mopo
