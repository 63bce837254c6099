// Fibers: the execution contexts on which emulated CUDA threads run.
//
// A switch saves the callee-saved registers and changes the stack pointer: about 2 ns, no system
// call. A fiber is not tied to one CUDA thread. It runs threads one after another for as long as
// none of them has to wait, so a kernel without barriers needs a single fiber, and a block needs no
// more fibers than it has threads waiting at one time.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)))
#define VTOK_EMULATION_UCONTEXT
#endif
#ifdef VTOK_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace vtok::emulation {

// A suspended execution: its stack pointer, or a ucontext where no assembly exists for the
// processor.
struct Context {
#ifdef VTOK_EMULATION_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
};

// Makes `context` start `entry`, which must never return, on the stack that ends at `stack_top`.
void prepare_context(Context& context, char* stack_bottom, char* stack_top, void (*entry)());

// Suspends the caller into `from` and continues `to`.
void switch_context(Context& from, Context& to);

struct Fiber {
  Context context;
  char* guard = nullptr;         // one inaccessible page: a stack overflow faults here
  char* stack_bottom = nullptr;  // lowest usable address
  char* stack_top = nullptr;
  Fiber* next_free = nullptr;
};

// Fibers are made once and reused for every block of every launch.
class FiberPool {
 public:
  explicit FiberPool(void (*entry)()) : entry_(entry) {}

  // A fiber that waits at the start of `entry`, or inside it where it was when released.
  Fiber* acquire() {
    Fiber* fiber = free_;
    if (fiber == nullptr) return create();
    free_ = fiber->next_free;
    return fiber;
  }

  void release(Fiber* fiber) {
    fiber->next_free = free_;
    free_ = fiber;
  }

  // Abandons whatever the fibers were doing (a launch failed) and makes all of them free.
  void reset();

  // Whether `address` lies in a guard page, that is, a thread overflowed its stack.
  bool is_stack_overflow(const char* address) const;

  // 64 KiB per thread: local memory and register spills of one CUDA thread, plus one call of
  // printf.
  static constexpr size_t kStackBytes = 64 << 10;

 private:
  Fiber* create();

  void (*entry_)();
  Fiber* free_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

}  // namespace vtok::emulation
