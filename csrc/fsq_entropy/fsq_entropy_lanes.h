// Reductions that vectorise, and buffers, for the CPU kernels of the FSQ entropy.
//
// Everything here lies in the namespace of an instruction set: see Note [One source, several
// instruction sets] in core/host_device.h, which also rules out std::vector.
#pragma once

#include "../core/isa.h"
#include "../core/tensor_view.h"

namespace vtok::VTOK_ISA {

// Partial sums of a reduction, so that it vectorises: two AVX-512 or four AVX2 registers.
constexpr int kLanes = 32;

// Sum of term(i) over [0, count), in an order that only depends on count.
template <typename Real, typename Term>
VTOK_FUNCTION double lane_sum(int64_t count, const Term& term) {
  alignas(64) Real lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[lane]);
  return sum;
}

template <typename Real>
static Real largest(const Real* values, int count) {
  alignas(64) Real lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    lanes[lane] = values[i] > lanes[lane] ? values[i] : lanes[lane];
  }
  Real result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  return result;
}

// Uninitialised memory of a thread.
template <typename Element>
struct Buffer {
  explicit Buffer(int64_t size) : data(new Element[size]) {}
  ~Buffer() { delete[] data; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  Element* data;
};

}  // namespace vtok::VTOK_ISA
