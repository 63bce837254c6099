#include "fault.h"

#include <pthread.h>
#include <ucontext.h>

#include <cstdio>
#include <vector>

#include "device_memory.h"
#include "execution.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace vtok::emulation {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
constexpr int kNumSignals = 3;
struct sigaction previous_actions[kNumSignals];
pthread_t launching_thread;  // meaningful while a kernel runs

Access access_of(const void* context) {
#if defined(__linux__) && defined(__x86_64__)
  // Bit 1 of the page fault error code: 0 for a read, 1 for a write.
  const auto error = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR];
  return (error & 2) != 0 ? Access::kWrite : Access::kRead;
#else
  (void)context;
  return Access::kUnknown;
#endif
}

void handle_signal(int signal, siginfo_t* info, void* context) {
  if (inside_kernel() && pthread_equal(pthread_self(), launching_thread)) {
    abandon_thread({signal, static_cast<const char*>(info->si_addr), access_of(context)});
  }
  // Not ours: with the previous action back in place, returning repeats the faulting instruction.
  for (int i = 0; i < kNumSignals; ++i) {
    if (kSignals[i] == signal) sigaction(signal, &previous_actions[i], nullptr);
  }
}

}  // namespace

std::string describe_fault(const Fault& fault) {
  if (fault.signal == SIGFPE) return "integer division by zero";
  const char* access = fault.access == Access::kWrite  ? "write"
                       : fault.access == Access::kRead ? "read"
                                                       : "access";
  std::string text = shared_memory().describe_address(fault.address);
  if (!text.empty()) return "out-of-bounds " + std::string(access) + " of shared memory: " + text;
  text = describe_device_address(fault.address, fault.access == Access::kWrite);
  if (!text.empty()) return text;
  char address[32];
  std::snprintf(address, sizeof address, "0x%zx",
                static_cast<size_t>(reinterpret_cast<uintptr_t>(fault.address)));
  const bool is_null = fault.address < reinterpret_cast<const char*>(uintptr_t{1} << 16);
  return "out-of-bounds " + std::string(access) +
         (is_null ? " near the null pointer, address " : " of address ") + address +
         (is_null ? "" : ", which belongs to no argument");
}

FaultGuard::FaultGuard() {
  static std::vector<char> handler_stack(
      64 << 10);  // a fiber that overflowed its stack has none left to handle it on
  launching_thread = pthread_self();
  fegetenv(&floating_point_);
  stack_t stack = {};
  stack.ss_sp = handler_stack.data();
  stack.ss_size = handler_stack.size();
  sigaltstack(&stack, &previous_stack_);
  struct sigaction action = {};
  action.sa_sigaction = handle_signal;
  // SA_NODEFER: the handler does not return, so the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
}

FaultGuard::~FaultGuard() {
  for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
  sigaltstack(&previous_stack_, nullptr);
  fesetenv(&floating_point_);
}

}  // namespace vtok::emulation
