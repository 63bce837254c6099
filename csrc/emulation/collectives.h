// Barriers, shuffles and votes with the names and meaning they have in CUDA C++.
//
// The source position arrives through default arguments, so that a message can say where each
// thread waits. A lane that is named by a mask and has exited is an error here even where hardware
// happens to go on; lanes that never existed (a block that is not a multiple of 32) are left out of
// the mask, as on hardware.
#pragma once

#include <cstring>

#include "cuda_types.h"
#include "execution.h"

#define VTOK_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace vtok::emulation {

struct ShuffleOperand {
  uint64_t value;
  uint64_t result;
  int source_lane;  // -1 after completion: the source was not among the participants
};

void complete_shuffle(void* const* operands, uint32_t lanes);

struct VoteOperand {
  bool predicate;
  uint32_t ballot;
};

void complete_vote(void* const* operands, uint32_t lanes);
void complete_nothing(void* const* operands, uint32_t lanes);

enum class ReduceOperator { kAdd, kMin, kMax };

struct ReduceOperand {
  int64_t value;
  int64_t result;
  ReduceOperator reduce;
};

void complete_reduce(void* const* operands, uint32_t lanes);

[[noreturn]] void fail_shuffle_source(int source_lane, uint32_t mask, const Site& site);
[[noreturn]] void fail_shuffle_width(int width, const Site& site);

template <typename T>
inline T shuffle(uint32_t mask, T value, int source_lane, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  ShuffleOperand operand{0, 0, source_lane};
  std::memcpy(&operand.value, &value, sizeof(T));
  warp_collective(mask, &operand, site, complete_shuffle);
  if (operand.source_lane < 0) fail_shuffle_source(source_lane, mask, site);
  std::memcpy(&value, &operand.result, sizeof(T));
  return value;
}

inline void check_width(int width, const Site& site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail_shuffle_width(width, site);
}

inline uint32_t vote(uint32_t mask, bool predicate, const Site& site) {
  VoteOperand operand{predicate, 0};
  warp_collective(mask, &operand, site, complete_vote);
  return operand.ballot;
}

template <typename T>
inline T reduce(uint32_t mask, T value, ReduceOperator reduce_operator, const Site& site) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>,
                "__reduce_*_sync takes int or unsigned");
  ReduceOperand operand{static_cast<int64_t>(value), 0, reduce_operator};
  warp_collective(mask, &operand, site, complete_reduce);
  return static_cast<T>(operand.result);
}

inline int lane_of_current_thread() {
  return static_cast<int>(current_thread() % 32);
}

}  // namespace vtok::emulation

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source_lane, int width = 32, VTOK_EMULATION_SITE) {
  const vtok::emulation::Site site{"__shfl_sync", file, line};
  vtok::emulation::check_width(width, site);
  const int lane = vtok::emulation::lane_of_current_thread();
  const int segment = lane & ~(width - 1);
  return vtok::emulation::shuffle(mask, value, segment + (source_lane & (width - 1)), site);
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        VTOK_EMULATION_SITE) {
  const vtok::emulation::Site site{"__shfl_up_sync", file, line};
  vtok::emulation::check_width(width, site);
  const int lane = vtok::emulation::lane_of_current_thread();
  const int source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return vtok::emulation::shuffle(mask, value, inside ? source : lane, site);
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          VTOK_EMULATION_SITE) {
  const vtok::emulation::Site site{"__shfl_down_sync", file, line};
  vtok::emulation::check_width(width, site);
  const int lane = vtok::emulation::lane_of_current_thread();
  const int source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return vtok::emulation::shuffle(mask, value, inside ? source : lane, site);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         VTOK_EMULATION_SITE) {
  const vtok::emulation::Site site{"__shfl_xor_sync", file, line};
  vtok::emulation::check_width(width, site);
  const int lane = vtok::emulation::lane_of_current_thread();
  const int source = lane ^ lane_mask;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return vtok::emulation::shuffle(mask, value, inside ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, VTOK_EMULATION_SITE) {
  return vtok::emulation::vote(mask, predicate != 0, {"__ballot_sync", file, line});
}

inline int __any_sync(unsigned mask, int predicate, VTOK_EMULATION_SITE) {
  return vtok::emulation::vote(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate, VTOK_EMULATION_SITE) {
  return vtok::emulation::vote(mask, predicate == 0, {"__all_sync", file, line}) == 0;
}

template <typename T>
inline T __reduce_add_sync(unsigned mask, T value, VTOK_EMULATION_SITE) {
  const vtok::emulation::Site site{"__reduce_add_sync", file, line};
  return vtok::emulation::reduce(mask, value, vtok::emulation::ReduceOperator::kAdd, site);
}

template <typename T>
inline T __reduce_min_sync(unsigned mask, T value, VTOK_EMULATION_SITE) {
  const vtok::emulation::Site site{"__reduce_min_sync", file, line};
  return vtok::emulation::reduce(mask, value, vtok::emulation::ReduceOperator::kMin, site);
}

template <typename T>
inline T __reduce_max_sync(unsigned mask, T value, VTOK_EMULATION_SITE) {
  const vtok::emulation::Site site{"__reduce_max_sync", file, line};
  return vtok::emulation::reduce(mask, value, vtok::emulation::ReduceOperator::kMax, site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, VTOK_EMULATION_SITE) {
  vtok::emulation::warp_collective(mask, nullptr, {"__syncwarp", file, line},
                                   vtok::emulation::complete_nothing);
}

inline void __syncthreads(VTOK_EMULATION_SITE) {
  vtok::emulation::block_barrier(false, {"__syncthreads", file, line});
}

inline int __syncthreads_count(int predicate, VTOK_EMULATION_SITE) {
  return static_cast<int>(
      vtok::emulation::block_barrier(predicate != 0, {"__syncthreads_count", file, line}).num_true);
}

inline int __syncthreads_or(int predicate, VTOK_EMULATION_SITE) {
  return vtok::emulation::block_barrier(predicate != 0, {"__syncthreads_or", file, line})
             .num_true != 0;
}

inline int __syncthreads_and(int predicate, VTOK_EMULATION_SITE) {
  const auto result =
      vtok::emulation::block_barrier(predicate != 0, {"__syncthreads_and", file, line});
  return result.num_true == result.num_threads;
}

// One thread runs at a time and switches happen at collectives only, so memory is always in order
// here.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

[[noreturn]] inline void __trap() {
  vtok::emulation::fail("__trap() was called");
}

#undef VTOK_EMULATION_SITE
