// The messages of failed blocks: where, which thread, and who waits where.
#include <cstdio>
#include <cstring>
#include <map>
#include <tuple>

#include "block_state.h"

namespace vtok::emulation {
namespace {

std::string thread_text(unsigned thread) {
  const uint3 index = block.thread_index[thread];
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u)", index.x, index.y, index.z);
  return text;
}

// "16 threads wait at __syncthreads (x.cu:12), first thread (0, 0, 0); 16 threads wait at ..."
std::string describe_waiting() {
  using Place = std::tuple<std::string, uint32_t, unsigned>;  // operation, mask, warp
  std::map<Place, std::pair<unsigned, unsigned>> places;      // -> (number, first thread)
  for (unsigned thread = 0; thread < block.num_threads; ++thread) {
    const bool has_exited = ((block.warps[thread / 32].exited >> (thread % 32)) & 1u) != 0;
    if (!is_started(thread) || has_exited) continue;
    const uint32_t mask = block.wait_mask[thread];
    const unsigned warp = mask != 0 ? thread / 32 : 0;
    auto& place = places[{describe(*block.wait_site[thread]), mask, warp}];
    if (place.first++ == 0) place.second = thread;
  }
  std::string text;
  for (const auto& [key, place] : places) {
    const uint32_t mask = std::get<1>(key);
    text += (text.empty() ? "" : "; ") + std::to_string(place.first) + " threads wait at " +
            std::get<0>(key) + (mask != 0 ? ", " + mask_text(mask) : "") + ", first " +
            thread_text(place.second);
  }
  return text;
}

}  // namespace

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.operation) + " (" + (slash != nullptr ? slash + 1 : site.file) + ":" +
         std::to_string(site.line) + ")";
}

std::string mask_text(uint32_t mask) {
  char text[32];
  std::snprintf(text, sizeof text, "mask 0x%08x", mask);
  return text;
}

std::string block_text() {
  char text[64];
  std::snprintf(text, sizeof text, "block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
  return block.launch->name + ": " + text;
}

std::string failure_text(const FiberPool& pool) {
  if (block.outcome == Outcome::kStuck) {
    return block_text() +
           ": deadlock, a collective is not reached by all its threads: " + describe_waiting() +
           "; " + std::to_string(block.num_threads - block.num_alive) + " threads have exited";
  }
  const std::string position = block_text() + ", " + thread_text(block.current) + ": ";
  if (block.outcome == Outcome::kFailed) return position + block.error;
  if (pool.is_stack_overflow(block.fault.address)) {
    return position + "stack overflow: local variables of this thread need more than " +
           std::to_string(FiberPool::kStackBytes >> 10) + " KiB, or it recurses without end";
  }
  return position + describe_fault(block.fault);
}

}  // namespace vtok::emulation
