// Fibers in order, barriers and warp collectives; see Note [Which thread runs next].
#include "scheduler.h"

#include <cstdio>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "async_copy.h"
#include "block_state.h"
#include "shared_memory.h"
#include "warpgroup.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace vtok::emulation {

Block block;

namespace {

void thread_loop();
FiberPool& pool() {
  static FiberPool* instance = new FiberPool(thread_loop);  // kept until the process ends
  return *instance;
}

bool same_operation(const Site& a, const Site& b) {
  return a.operation == b.operation || std::strcmp(a.operation, b.operation) == 0;
}

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && same_operation(a, b) &&
         (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void make_ready(unsigned warp, uint32_t lanes) {
  block.ready[warp] |= lanes;
  block.ready_warps |= 1u << warp;
}

// xorshift64*: period 2^64 - 1, three shifts and a multiplication.
unsigned random_below_32() {
  uint64_t& state = block.random_state;
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return static_cast<unsigned>((state * 0x2545f4914f6cdd1dull) >> 59);
}

unsigned random_bit(uint32_t mask) {
  const unsigned start = random_below_32();
  const uint32_t rotated = (mask >> start) | (mask << ((32 - start) & 31));
  return (static_cast<unsigned>(__builtin_ctz(rotated)) + start) & 31u;
}

// Removes the next thread to run from the ready set. Requires ready_warps != 0.
unsigned take_next() {
  unsigned warp, lane;
  if (block.order == ThreadOrder::kForward) {
    warp = static_cast<unsigned>(__builtin_ctz(block.ready_warps));
    lane = static_cast<unsigned>(__builtin_ctz(block.ready[warp]));
  } else if (block.order == ThreadOrder::kReverse) {
    warp = 31u - static_cast<unsigned>(__builtin_clz(block.ready_warps));
    lane = 31u - static_cast<unsigned>(__builtin_clz(block.ready[warp]));
  } else {
    warp = random_bit(block.ready_warps);
    lane = random_bit(block.ready[warp]);
  }
  block.ready[warp] &= ~(1u << lane);
  if (block.ready[warp] == 0) block.ready_warps &= ~(1u << warp);
  return warp * 32 + lane;
}

void set_current(unsigned thread) {
  block.current = thread;
  threadIdx = block.thread_index[thread];
}

void start_on(Fiber* fiber, unsigned thread) {
  block.started[thread / 32] |= 1u << (thread % 32);
  block.fiber_of[thread] = fiber;
  set_current(thread);
}

[[noreturn]] void leave_launch(Outcome outcome) {
  block.outcome = outcome;
  Context abandoned;
  switch_context(abandoned, block.main);
  __builtin_unreachable();
}

// Continues `thread` on its fiber, or starts it on a free one, and suspends the caller.
void switch_to(unsigned thread) {
  Fiber* const self = block.current_fiber;
  Fiber* target;
  if (is_started(thread)) {
    target = block.fiber_of[thread];
    set_current(thread);
  } else {
    target = pool().acquire();
    start_on(target, thread);
  }
  block.current_fiber = target;
  ++block.num_switches;
  switch_context(self->context, target->context);
}

// The current thread waits: others run until somebody has made it ready and it is its turn.
void wait_for_turn() {
  if (block.ready_warps == 0) leave_launch(Outcome::kStuck);
  const unsigned next = take_next();
  if (next != block.current) switch_to(next);
}

void complete_barrier() {
  block.barrier_result = {block.num_true, block.num_at_barrier};
  block.num_at_barrier = block.num_true = 0;
  for (unsigned warp = 0; warp < (block.num_threads + 31) / 32; ++warp) {
    if (block.warps[warp].at_barrier == 0) continue;
    make_ready(warp, block.warps[warp].at_barrier);
    block.warps[warp].at_barrier = 0;
  }
}

// The current thread has returned from the kernel.
void exit_thread() {
  async_copy_finish_thread();
  warpgroup_finish_thread();
  Warp& warp = block.warps[block.current / 32];
  const uint32_t bit = 1u << (block.current % 32);
  for (int i = 0; i < warp.num_groups; ++i) {
    if ((warp.groups[i].mask & bit) == 0) continue;
    fail("returns from the kernel while other lanes of its warp wait for it at " +
         describe(*warp.groups[i].site) + ", " + mask_text(warp.groups[i].mask));
  }
  warp.exited |= bit;
  --block.num_alive;
  if (block.num_at_barrier != 0 && block.num_at_barrier == block.num_alive) complete_barrier();
}

// What a fiber does: run a thread, then the next one that has not started, until one that has
// started is due.
void thread_loop() {
  for (;;) {
    block.launch->invoke(block.launch->arguments);
    exit_thread();
    Fiber* const self = block.current_fiber;
    if (block.ready_warps == 0) {
      block.outcome = block.num_alive == 0 ? Outcome::kDone : Outcome::kStuck;
      pool().release(self);
      switch_context(self->context, block.main);
      continue;
    }
    const unsigned next = take_next();
    if (is_started(next)) {
      pool().release(self);
      switch_to(next);
    } else {
      start_on(self, next);
    }
  }
}

void prepare_threads(const Launch& launch) {
  block.launch = &launch;
  block.num_threads = launch.block.x * launch.block.y * launch.block.z;
  for (unsigned thread = 0; thread < block.num_threads; ++thread) {
    block.thread_index[thread] = {thread % launch.block.x, thread / launch.block.x % launch.block.y,
                                  thread / (launch.block.x * launch.block.y)};
  }
  blockDim = launch.block;
  gridDim = launch.grid;
  const Options options = get_options();
  block.order = options.order;
  block.random_state = (options.seed + 1) * 0x9e3779b97f4a7c15ull | 1u;
  block.num_switches = 0;
}

void run_block(uint64_t index) {
  blockIdx.x = static_cast<unsigned>(index % gridDim.x);
  blockIdx.y = static_cast<unsigned>(index / gridDim.x % gridDim.y);
  blockIdx.z = static_cast<unsigned>(index / gridDim.x / gridDim.y);
  block.num_alive = block.num_threads;
  block.num_at_barrier = block.num_true = 0;
  const unsigned num_warps = (block.num_threads + 31) / 32;
  for (unsigned warp = 0; warp < num_warps; ++warp) {
    const unsigned lanes = block.num_threads - warp * 32 < 32 ? block.num_threads - warp * 32 : 32;
    Warp& state = block.warps[warp];
    state.existing = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1u;
    state.exited = state.at_barrier = 0;
    state.num_groups = 0;
    block.started[warp] = 0;
    block.ready[warp] = state.existing;
  }
  block.ready_warps = num_warps == 32 ? 0xffffffffu : (1u << num_warps) - 1u;
  shared_memory().begin_block();

  block.outcome = Outcome::kRunning;
  block.current_fiber = pool().acquire();
  start_on(block.current_fiber, take_next());
  block.inside_kernel = true;
  switch_context(block.main, block.current_fiber->context);
  block.inside_kernel = false;
  if (block.outcome == Outcome::kDone) {
    const std::string damage = shared_memory().damaged_canary();
    if (!damage.empty()) throw std::runtime_error(block_text() + ": " + damage);
    return;
  }
  const std::string text = failure_text(pool());
  pool().reset();
  async_copy_reset();
  warpgroup_reset();
  throw std::runtime_error(text);
}

// A permutation of 0..count-1 for every order: i -> (offset + i * stride) mod count with a stride
// coprime to count.
class BlockPermutation {
 public:
  explicit BlockPermutation(uint64_t count) : count_(count) {
    if (block.order == ThreadOrder::kReverse) {
      offset_ = stride_ = count - 1;
    } else if (block.order == ThreadOrder::kSeeded) {
      offset_ = block.random_state % count;
      stride_ = (block.random_state >> 20) % count;
      while (std::gcd(stride_, count) != 1) ++stride_;
    }
    if (count == 1) offset_ = 0;
  }

  uint64_t operator()(uint64_t i) const {
    __extension__ typedef unsigned __int128 Wide;
    return static_cast<uint64_t>((offset_ + static_cast<Wide>(i) * stride_) % count_);
  }

 private:
  uint64_t count_, offset_ = 0, stride_ = 1;
};

}  // namespace

void run_blocks(const Launch& launch) {
  prepare_threads(launch);
  shared_memory().begin_launch(launch.dynamic_shared_bytes, launch.shared_limit);
  const uint64_t num_blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const BlockPermutation permutation(num_blocks);
  const FaultGuard guard;
  for (uint64_t i = 0; i < num_blocks; ++i) run_block(permutation(i));
  add_statistics({1, num_blocks, num_blocks * block.num_threads, block.num_switches});
}

void abandon_thread(const Fault& fault) {
  block.fault = fault;
  leave_launch(Outcome::kFaulted);
}

bool inside_kernel() {
  return block.inside_kernel;
}

unsigned current_thread() {
  return block.current;
}

void yield_to_others() {
  if (block.ready_warps == 0) return;
  const unsigned self = block.current;
  const unsigned next = take_next();
  make_ready(self / 32, 1u << (self % 32));
  switch_to(next);
}

void fail(const std::string& message) {
  if (!block.inside_kernel) throw std::runtime_error(message);
  block.error = message;
  leave_launch(Outcome::kFailed);
}

void fail_misaligned(const void* pointer, size_t alignment, const char* operation) {
  char text[200];
  std::snprintf(text, sizeof text,
                "misaligned address: %s needs a multiple of %zu bytes, got %p (off by %zu)",
                operation, alignment, pointer,
                static_cast<size_t>(reinterpret_cast<uintptr_t>(pointer) % alignment));
  fail(text);
}

void warp_collective(uint32_t mask, void* operand, const Site& site, CompleteFunction complete) {
  const unsigned thread = block.current;
  Warp& warp = block.warps[thread / 32];
  const uint32_t bit = 1u << (thread % 32);
  if ((mask & bit) == 0)
    fail(describe(site) + ": " + mask_text(mask) + " does not name the calling lane");
  mask &= warp.existing;
  if ((mask & warp.exited) != 0) {
    fail(describe(site) + ": " + mask_text(mask) + " names lane " +
         std::to_string(__builtin_ctz(mask & warp.exited)) + ", which has exited");
  }
  int i = 0;
  while (i < warp.num_groups && warp.groups[i].mask != mask) ++i;
  if (i == warp.num_groups) {
    warp.groups[warp.num_groups++] = {mask, 0, &site};
  } else if (!same_operation(site, *warp.groups[i].site)) {
    fail("divergent collective: this lane is at " + describe(site) + " while lane " +
         std::to_string(__builtin_ctz(warp.groups[i].arrived)) + " waits for it at " +
         describe(*warp.groups[i].site) + ", " + mask_text(mask));
  }
  Group& group = warp.groups[i];
  group.arrived |= bit;
  warp.operands[thread % 32] = operand;
  block.wait_site[thread] = &site;
  block.wait_mask[thread] = mask;
  if (group.arrived == mask) {
    complete(warp.operands, mask);
    group = warp.groups[--warp.num_groups];
    make_ready(thread / 32, mask);
  }
  wait_for_turn();
}

BarrierResult block_barrier(bool predicate, const Site& site) {
  const unsigned thread = block.current;
  if (block.num_at_barrier == 0) {
    block.barrier_site = &site;
  } else if (!same_place(site, *block.barrier_site)) {
    fail("barrier in divergent code: this thread is at " + describe(site) + " while " +
         std::to_string(block.num_at_barrier) + " threads of the block wait at " +
         describe(*block.barrier_site));
  }
  block.warps[thread / 32].at_barrier |= 1u << (thread % 32);
  block.wait_site[thread] = &site;
  block.wait_mask[thread] = 0;
  block.num_true += predicate;
  if (++block.num_at_barrier == block.num_alive) complete_barrier();
  wait_for_turn();
  return block.barrier_result;
}

}  // namespace vtok::emulation
