// Loops over threads. The thread count comes from torch.get_num_threads() through Python; 1 opens
// no OpenMP region at all. Reductions must not depend on it: split the work by a fixed grain, never
// by the thread count.
#pragma once

#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace vtok {

// True in a child that was forked after this module was imported: libgomp's thread pool does not
// survive a fork, and a region opened there would wait for ever.
bool in_forked_child();

// Calls function(begin, end) on consecutive ranges that cover [0, count), each but the last a
// multiple of `grain`.
template <typename Function>
void parallel_for(int64_t count, int64_t grain, int num_threads, const Function& function) {
  if (count <= 0) return;
  const int64_t num_grains = (count + grain - 1) / grain;
#ifdef _OPENMP
  const int64_t team = num_threads < num_grains ? num_threads : num_grains;
  if (team > 1 && !in_forked_child()) {
    std::exception_ptr failure = nullptr;
#pragma omp parallel num_threads(static_cast<int>(team))
    {
      const int64_t size = omp_get_num_threads();
      const int64_t rank = omp_get_thread_num();
      const int64_t begin = num_grains * rank / size * grain;
      const int64_t end = num_grains * (rank + 1) / size * grain;
      try {
        if (begin < count) function(begin, end < count ? end : count);
      } catch (...) {
#pragma omp critical(vtok_parallel_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#else
  (void)num_threads;
#endif
  function(int64_t{0}, count);
}

}  // namespace vtok
