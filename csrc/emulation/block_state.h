// State of the block that runs, shared by the scheduler and by the texts of its failures.
#pragma once

#include <cstdint>
#include <string>

#include "execution.h"
#include "fiber.h"
#include "report.h"
#include "scheduler.h"

namespace vtok::emulation {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / 32;

// Lanes of a warp that wait for each other. Groups of one warp have different masks; a lane waits
// in one of them.
struct Group {
  uint32_t mask;
  uint32_t arrived;
  const Site* site;  // of the first to arrive
};

struct Warp {
  uint32_t existing;
  uint32_t exited;
  uint32_t at_barrier;
  int num_groups;
  Group groups[32];
  void* operands[32];
};

enum class Outcome { kRunning, kDone, kStuck, kFailed, kFaulted };

struct Block {
  const Launch* launch = nullptr;
  bool inside_kernel = false;
  Outcome outcome = Outcome::kDone;
  std::string error;  // of kFailed, without position
  Fault fault;        // of kFaulted

  ThreadOrder order = ThreadOrder::kForward;
  uint64_t random_state = 1;
  uint64_t num_switches = 0;

  unsigned current = 0;
  unsigned num_threads = 0;
  unsigned num_alive = 0;
  uint32_t ready_warps = 0;  // bit w: ready[w] is not zero
  uint32_t ready[kMaxWarps] = {};
  uint32_t started[kMaxWarps] = {};
  Warp warps[kMaxWarps];

  unsigned num_at_barrier = 0, num_true = 0;
  const Site* barrier_site = nullptr;
  BarrierResult barrier_result = {0, 0};

  const Site* wait_site[kMaxThreads] = {};  // where a waiting thread waits
  uint32_t wait_mask[kMaxThreads] = {};     // 0 at a block barrier
  uint3 thread_index[kMaxThreads];
  Fiber* fiber_of[kMaxThreads] = {};
  Fiber* current_fiber = nullptr;
  Context main;
};

extern Block block;

inline bool is_started(unsigned thread) {
  return ((block.started[thread / 32] >> (thread % 32)) & 1u) != 0;
}

// "KERNEL: block (x, y, z)"
std::string block_text();

// Why block.outcome is neither kRunning nor kDone; `pool` tells a stack overflow from other faults.
std::string failure_text(const FiberPool& pool);

}  // namespace vtok::emulation
