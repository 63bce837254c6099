// What the lane that arrives last does for all lanes of a warp collective.
#include "collectives.h"

#include <algorithm>

namespace vtok::emulation {
namespace {

template <typename Operand, typename Function>
void for_each_lane(void* const* operands, uint32_t lanes, Function&& function) {
  for (; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    function(lane, *static_cast<Operand*>(operands[lane]));
  }
}

}  // namespace

void complete_nothing(void* const* /*operands*/, uint32_t /*lanes*/) {}

void complete_shuffle(void* const* operands, uint32_t lanes) {
  for_each_lane<ShuffleOperand>(operands, lanes, [&](int, ShuffleOperand& operand) {
    const int source = operand.source_lane;
    if (source < 0 || source > 31 || ((lanes >> source) & 1u) == 0) {
      operand.source_lane = -1;
    } else {
      operand.result = static_cast<const ShuffleOperand*>(operands[source])->value;
    }
  });
}

void complete_vote(void* const* operands, uint32_t lanes) {
  uint32_t ballot = 0;
  for_each_lane<VoteOperand>(operands, lanes, [&](int lane, const VoteOperand& operand) {
    ballot |= static_cast<uint32_t>(operand.predicate) << lane;
  });
  for_each_lane<VoteOperand>(operands, lanes,
                             [&](int, VoteOperand& operand) { operand.ballot = ballot; });
}

void complete_reduce(void* const* operands, uint32_t lanes) {
  int64_t result = 0;
  bool first = true;
  for_each_lane<ReduceOperand>(operands, lanes, [&](int, const ReduceOperand& operand) {
    if (first) {
      result = operand.value;
    } else if (operand.reduce == ReduceOperator::kAdd) {
      result += operand.value;
    } else if (operand.reduce == ReduceOperator::kMin) {
      result = std::min(result, operand.value);
    } else {
      result = std::max(result, operand.value);
    }
    first = false;
  });
  for_each_lane<ReduceOperand>(operands, lanes,
                               [&](int, ReduceOperand& operand) { operand.result = result; });
}

void fail_shuffle_source(int source_lane, uint32_t mask, const Site& site) {
  fail(describe(site) + " reads lane " + std::to_string(source_lane) +
       ", which takes no part in it (" + mask_text(mask) + "): the value is undefined");
}

void fail_shuffle_width(int width, const Site& site) {
  fail(describe(site) + ": width must be a power of two from 1 to 32, got " +
       std::to_string(width));
}

}  // namespace vtok::emulation
