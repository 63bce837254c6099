// What device functions ask of the emulation: who am I, wait for others, stop with an error.
#pragma once

#include <cstdint>
#include <string>

namespace vtok::emulation {

// A source position with the name of the operation there, as it appears in messages.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

// "OPERATION (FILE:LINE)"
std::string describe(const Site& site);

// "mask 0x0000ffff"
std::string mask_text(uint32_t mask);

// Whether the caller runs on behalf of an emulated CUDA thread.
bool inside_kernel();

// Linear index of the running thread in its block: warp = index / 32, lane = index % 32.
unsigned current_thread();

// Ends the launch: it throws std::runtime_error("KERNEL: block (..), thread (..): message").
[[noreturn]] void fail(const std::string& message);

// Waits until every lane of `mask` is here. The lane that comes last calls complete(operands,
// lanes), which computes the results of all of them; `operand` points to this lane's arguments and
// results and is found at operands[lane].
using CompleteFunction = void (*)(void* const* operands, uint32_t lanes);
void warp_collective(uint32_t mask, void* operand, const Site& site, CompleteFunction complete);

// Waits until every thread of the block that has not exited is here. Returns how many of them
// passed a true predicate, and how many there were.
struct BarrierResult {
  unsigned num_true;
  unsigned num_threads;
};
BarrierResult block_barrier(bool predicate, const Site& site);

// Lets other threads that can run go first.
void yield_to_others();

// Fails unless `pointer` is a multiple of `alignment`; `operation` names the access.
void fail_misaligned(const void* pointer, size_t alignment, const char* operation);
inline void check_alignment(const void* pointer, size_t alignment, const char* operation) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    fail_misaligned(pointer, alignment, operation);
}

}  // namespace vtok::emulation
