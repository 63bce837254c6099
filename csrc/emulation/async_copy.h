// cp.async: copies from global to shared memory that complete later, in groups, each thread on its
// own.
//
// In mode kLate bytes arrive when a wait forces them and not before, which is as late as a correct
// program allows; the destination holds poison in the meantime. A missing wait, a wait for too few
// groups and a stage that is refilled while others still read it all give NaN results. Global
// memory is read at issue, so that a fault names the right thread.
#pragma once

#include <cstddef>

namespace vtok::emulation {

// Copies `bytes` (4, 8 or 16), or writes zeros without touching `source` if it is not valid.
void async_copy(void* shared_destination, const void* global_source, size_t bytes, bool valid);
void async_copy_commit();
// Waits until at most `num_pending` of the latest groups of this thread are in flight.
void async_copy_wait(size_t num_pending);
void async_copy_wait_all();

// For the scheduler: mode of the launch; end of a thread (reports groups nobody waited for); end of
// a failed launch.
void async_copy_begin_launch(const char* kernel);
void async_copy_finish_thread();
void async_copy_reset();

}  // namespace vtok::emulation
