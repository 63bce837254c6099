// Context switches (x86-64, aarch64, ucontext elsewhere) and the pool of stacks.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifndef VTOK_EMULATION_UCONTEXT
extern "C" __attribute__((visibility("hidden"))) void vtok_emulation_switch(void** save,
                                                                            void* load);

#if defined(__x86_64__)
// The System V ABI keeps rbx, rbp and r12-r15 across calls. Leaving through `jmp` rather than `ret`
// keeps the processor's return predictor, which expects calls and returns to pair up, out of it.
asm(R"(
.text
.p2align 4
.globl vtok_emulation_switch
.hidden vtok_emulation_switch
.type vtok_emulation_switch, @function
vtok_emulation_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size vtok_emulation_switch, .-vtok_emulation_switch
)");
#elif defined(__aarch64__)
// AAPCS64 keeps x19-x30 and the low halves of v8-v15 across calls.
asm(R"(
.text
.p2align 4
.globl vtok_emulation_switch
.hidden vtok_emulation_switch
.type vtok_emulation_switch, %function
vtok_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size vtok_emulation_switch, .-vtok_emulation_switch
)");
#endif
#endif  // VTOK_EMULATION_UCONTEXT

namespace vtok::emulation {

#ifdef VTOK_EMULATION_UCONTEXT

void prepare_context(Context& context, char* stack_bottom, char* stack_top, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack_bottom;
  context.state.uc_stack.ss_size = static_cast<size_t>(stack_top - stack_bottom);
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) {
  swapcontext(&from.state, &to.state);
}

#else

void prepare_context(Context& context, char* /*stack_bottom*/, char* stack_top, void (*entry)()) {
  // The frame that vtok_emulation_switch pops: zeros for the saved registers, `entry` as the
  // address to continue at.
#if defined(__x86_64__)
  constexpr size_t kFrameWords = 7, kEntryWord = 6;
  // At its first instruction a function expects its stack pointer 8 bytes off a 16-byte boundary.
  char* frame = stack_top - 8 - kFrameWords * sizeof(void*);
#else
  constexpr size_t kFrameWords = 20, kEntryWord = 11;
  char* frame = stack_top - kFrameWords * sizeof(void*);
#endif
  void* words[kFrameWords] = {};
  words[kEntryWord] = reinterpret_cast<void*>(entry);
  std::memcpy(frame, words, sizeof words);
  context.stack_pointer = frame;
}

void switch_context(Context& from, Context& to) {
  vtok_emulation_switch(&from.stack_pointer, to.stack_pointer);
}

#endif

Fiber* FiberPool::create() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = kStackBytes + page;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  auto fiber = std::make_unique<Fiber>();
  fiber->guard = static_cast<char*>(memory);
  fiber->stack_bottom = fiber->guard + page;
  // Stacks of equal alignment would put the hot frames of all threads of a block into the same few
  // cache sets; they are staggered over 32 cache lines instead.
  const size_t colour = (fibers_.size() % 32) * 128;
  fiber->stack_top = fiber->guard + bytes - colour;
  prepare_context(fiber->context, fiber->stack_bottom, fiber->stack_top, entry_);
  fibers_.push_back(std::move(fiber));
  return fibers_.back().get();
}

void FiberPool::reset() {
  free_ = nullptr;
  for (const auto& fiber : fibers_) {
    prepare_context(fiber->context, fiber->stack_bottom, fiber->stack_top, entry_);
    release(fiber.get());
  }
}

bool FiberPool::is_stack_overflow(const char* address) const {
  for (const auto& fiber : fibers_) {
    if (address >= fiber->guard && address < fiber->stack_bottom) return true;
  }
  return false;
}

}  // namespace vtok::emulation
