// wgmma of sm_90a on the host: products that run later than they are issued, each thread on its
// own.
//
// They run at issue where cp.async lands late, so that a product meets the poison of data that has
// not arrived; where cp.async lands at issue, they run when a wait forces them, so that they read
// an operand that was overwritten too early. In the meantime the sums hold NaN.
#pragma once

#include <cstddef>

namespace vtok::emulation {

// Adds one product to a thread's sums.
using WarpgroupProduct = void (*)(float* sums, const void* a_rows, const void* b_rows, int step,
                                  unsigned thread);

// Issues a product into `count` sums, which a thread knows by their address.
void warpgroup_issue(float* sums, size_t count, const void* a_rows, const void* b_rows, int step,
                     WarpgroupProduct product);
void warpgroup_commit_products();
// Waits until at most `num_pending` of the latest groups of this thread are running.
void warpgroup_wait_products(size_t num_pending);

// For the scheduler: mode of the launch; end of a thread (reports products nobody waited for); end
// of a failed launch.
void warpgroup_begin_launch(const char* kernel);
void warpgroup_finish_thread();
void warpgroup_reset();

}  // namespace vtok::emulation
