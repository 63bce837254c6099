// Options, statistics and findings of the emulation. Findings that make the results of a launch
// meaningless are thrown from the launch as std::runtime_error; the others are collected here until
// a test takes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vtok::emulation {

// In which order threads that could run do run. A correct kernel gives the same result in every
// order.
enum class ThreadOrder {
  kForward,  // lowest warp, then lowest lane, first; blocks ascending
  kReverse,  // highest first; blocks descending
  kSeeded,   // a pseudo-random choice at every switch; blocks permuted
};

// When the bytes of a cp.async arrive in shared memory. A correct kernel cannot tell the
// difference.
enum class CpAsyncMode {
  kLate,   // only when a wait_group forces it; the destination holds poison until then
  kIssue,  // at once
};

struct Options {
  ThreadOrder order = ThreadOrder::kForward;
  uint64_t seed = 0;
  CpAsyncMode cp_async = CpAsyncMode::kLate;
};

struct Statistics {
  uint64_t launches = 0;
  uint64_t blocks = 0;
  uint64_t threads = 0;
  uint64_t switches = 0;  // from one thread to another
};

Options get_options();
void set_options(const Options& options);

Statistics get_statistics();
void add_statistics(const Statistics& launch);

void add_report(std::string message);

// All reports since the last call, oldest first.
std::vector<std::string> take_reports();

}  // namespace vtok::emulation
