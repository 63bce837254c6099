#include "async_copy.h"

#include <cstring>
#include <string>
#include <vector>

#include "canary.h"
#include "cuda_types.h"
#include "execution.h"
#include "report.h"
#include "shared_memory.h"

namespace vtok::emulation {
namespace {

struct Copy {
  void* destination;
  size_t bytes;
  unsigned char data[16];
};

// Copies of one thread in issue order. [0, landed) have arrived; group i ends before
// copies[group_ends[i]].
struct Queue {
  std::vector<Copy> copies;
  std::vector<size_t> group_ends;
  size_t landed = 0;
  size_t num_finished_groups = 0;

  void clear() {
    copies.clear();
    group_ends.clear();
    landed = num_finished_groups = 0;
  }
};

std::vector<Queue> queues(1024);  // by thread; they keep their capacity from block to block
bool any_used = false;
bool lands_late = true;
bool never_waited_reported = false;
const char* kernel_name = "";

void land_until(Queue& queue, size_t end) {
  for (; queue.landed < end; ++queue.landed) {
    const Copy& copy = queue.copies[queue.landed];
    if (lands_late) std::memcpy(copy.destination, copy.data, copy.bytes);
  }
}

}  // namespace

void async_copy(void* shared_destination, const void* global_source, size_t bytes, bool valid) {
  check_alignment(shared_destination, bytes, "cp.async destination");
  check_shared(shared_destination, bytes, "cp.async destination");
  Copy copy{shared_destination, bytes, {}};
  if (valid) {
    check_alignment(global_source, bytes, "cp.async source");
    std::memcpy(copy.data, global_source, bytes);
  }
  any_used = true;
  queues[current_thread()].copies.push_back(copy);
  if (lands_late) {
    std::memset(shared_destination, kSharedPoison, bytes);
  } else {
    std::memcpy(shared_destination, copy.data, bytes);
  }
}

void async_copy_commit() {
  any_used = true;
  Queue& queue = queues[current_thread()];
  queue.group_ends.push_back(queue.copies.size());
}

void async_copy_wait(size_t num_pending) {
  Queue& queue = queues[current_thread()];
  // While this thread waits the others run, and meet the poison if they use a stage that is being
  // refilled.
  if (lands_late && queue.landed < queue.copies.size()) yield_to_others();
  while (queue.group_ends.size() - queue.num_finished_groups > num_pending) {
    land_until(queue, queue.group_ends[queue.num_finished_groups++]);
  }
  if (queue.landed == queue.copies.size() && queue.num_finished_groups == queue.group_ends.size())
    queue.clear();
}

void async_copy_wait_all() {
  async_copy_commit();
  async_copy_wait(0);
}

void async_copy_begin_launch(const char* kernel) {
  kernel_name = kernel;
  never_waited_reported = false;
  lands_late = get_options().cp_async == CpAsyncMode::kLate;
}

void async_copy_finish_thread() {
  if (!any_used) return;
  Queue& queue = queues[current_thread()];
  const size_t in_flight = queue.copies.size() - queue.landed;
  queue.clear();
  if (in_flight == 0 || never_waited_reported) return;
  never_waited_reported = true;
  add_report(std::string(kernel_name) + ": block (" + std::to_string(blockIdx.x) + ", " +
             std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "), thread (" +
             std::to_string(threadIdx.x) + ", " + std::to_string(threadIdx.y) + ", " +
             std::to_string(threadIdx.z) + "): cp.async group never waited for: " +
             std::to_string(in_flight) + " copies are in flight when the thread exits");
}

void async_copy_reset() {
  for (Queue& queue : queues) queue.clear();
}

}  // namespace vtok::emulation
