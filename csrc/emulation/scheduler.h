// Runs the blocks of one launch, one after another, and the threads of a block on fibers.
//
// Note [Which thread runs next]
// A thread runs until it waits at a collective or exits; then the scheduler picks among the threads
// that can run, by ThreadOrder. A missing barrier therefore shows as a difference between orders:
// forward, a thread reads what a later one has not written yet; reverse, what an earlier one has
// not. When nothing can run and not every thread has exited, the launch is stuck, and the message
// says who waits where.
#pragma once

#include <cstddef>
#include <string>

#include "cuda_types.h"
#include "fault.h"

namespace vtok::emulation {

struct Launch {
  std::string name;
  dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
  size_t shared_limit = 0;                    // static and dynamic together, bytes
  void (*invoke)(void* arguments) = nullptr;  // runs the kernel once, as the current thread
  void* arguments = nullptr;
};

// Runs every block. Throws std::runtime_error for the first finding that makes the results
// meaningless.
void run_blocks(const Launch& launch);

// Leaves the running thread from a signal handler: run_blocks goes on by throwing what the fault
// means.
[[noreturn]] void abandon_thread(const Fault& fault);

}  // namespace vtok::emulation
