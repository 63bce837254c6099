// Turns a memory fault inside an emulated kernel into an error of the launch instead of the death
// of the process.
#pragma once

#include <cfenv>
#include <csignal>
#include <string>

namespace vtok::emulation {

enum class Access { kUnknown, kRead, kWrite };

struct Fault {
  int signal = 0;
  const char* address = nullptr;
  Access access = Access::kUnknown;
};

// What the fault means in terms of the kernel: which buffer, how far outside, or a write to an
// input.
std::string describe_fault(const Fault& fault);

// While it lives, SIGSEGV, SIGBUS and SIGFPE raised by a kernel on this OS thread end the launch.
// All other ones go to the handlers that were installed before.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  stack_t previous_stack_;
  fenv_t floating_point_;  // a signal handler starts with the default one, and we do not return
                           // from it
};

}  // namespace vtok::emulation
