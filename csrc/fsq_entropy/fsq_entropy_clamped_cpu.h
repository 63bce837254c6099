// One token's clamped entropy on the CPU, without looking at codes that are surely below the clamp.
//
//   H = -sum_ab low_a high_b max(ln low_a + ln high_b, ln clamp)
//
// Source: VidTok's FSQ regulariser.
#pragma once

#include "fsq_entropy_lanes.h"
#include "fsq_entropy_math.h"

namespace vtok::VTOK_ISA {

// The combinations of one half that can exceed the clamp together with some combination of the
// other half. All other products are below it, so that their logarithm is a constant.
template <typename Real>
struct Active {
  explicit Active(int size)
      : weight_buffer(size),
        log_buffer(size),
        grad_buffer(size),
        position_buffer(size),
        weight(weight_buffer.data),
        log_weight(log_buffer.data),
        grad(grad_buffer.data),
        position(position_buffer.data) {}

  void gather(const Real* half, int size, Real other_peak) {
    const Real clamp = static_cast<Real>(kFsqEntropyClamp);
    count = 0;
    for (int i = 0; i < size; ++i) {
      position[count] = i;
      count += half[i] * other_peak >= clamp ? 1 : 0;
    }
    rest = static_cast<Real>(lane_sum<Real>(
        size, [&](int64_t i) { return half[i] * other_peak >= clamp ? Real(0) : half[i]; }));
    for (int a = 0; a < count; ++a) weight[a] = half[position[a]];
    for (int a = 0; a < count; ++a) log_weight[a] = fsq_entropy_log_factor(weight[a]);
    sum = static_cast<Real>(lane_sum<Real>(count, [&](int64_t a) { return weight[a]; }));
  }

  Buffer<Real> weight_buffer, log_buffer, grad_buffer;
  Buffer<int> position_buffer;
  Real *weight, *log_weight, *grad;
  int* position;
  int count = 0;
  Real sum = 0;   // of the active weights
  Real rest = 0;  // of all others
};

template <typename Real>
struct ActiveHalves {
  ActiveHalves(int low_size, int high_size) : low(low_size), high(high_size) {}

  void gather(const Real* low_row, int low_size, const Real* high_row, int high_size) {
    low.gather(low_row, low_size, largest(high_row, high_size));
    high.gather(high_row, high_size, largest(low_row, low_size));
  }

  Active<Real> low, high;
};

template <typename Real>
static Real clamped_entropy(const ActiveHalves<Real>& halves) {
  const Real log_clamp = static_cast<Real>(kFsqEntropyLogClamp);
  const Active<Real>&low = halves.low, &high = halves.high;
  double sum = 0;
  for (int a = 0; a < low.count; ++a) {
    const Real log_low = low.log_weight[a];
    sum += low.weight[a] * lane_sum<Real>(high.count, [&](int64_t b) {
             const Real log_p = log_low + high.log_weight[b];
             return high.weight[b] * (log_p > log_clamp ? log_p : log_clamp);
           });
  }
  sum += kFsqEntropyLogClamp *
         (double(low.sum) * high.rest + double(low.rest) * (double(high.sum) + high.rest));
  return static_cast<Real>(-sum);
}

// The derivative by each active factor: sum over the other half of its weight times
// ln max(p, clamp) + [p >= clamp].
template <typename Real>
static void clamped_slopes(ActiveHalves<Real>& halves) {
  const Real log_clamp = static_cast<Real>(kFsqEntropyLogClamp);
  Active<Real>&low = halves.low, &high = halves.high;
  Real* high_grad = high.grad;
  for (int b = 0; b < high.count; ++b) high_grad[b] = log_clamp * low.rest;
  for (int a = 0; a < low.count; ++a) {
    const Real log_low = low.log_weight[a], weight = low.weight[a];
    const double sum = lane_sum<Real>(high.count, [&](int64_t b) {
      const Real log_p = log_low + high.log_weight[b];
      const Real slope = log_p >= log_clamp ? log_p + 1 : log_clamp;
      high_grad[b] += weight * slope;
      return high.weight[b] * slope;
    });
    low.grad[a] = static_cast<Real>(sum + log_clamp * high.rest);
  }
}

template <typename Real>
static void scatter(const Active<Real>& half, Real other_sum, Real factor, int size, Real* grad) {
  const Real inactive = factor * (static_cast<Real>(kFsqEntropyLogClamp) * other_sum);
  for (int i = 0; i < size; ++i) grad[i] = inactive;
  for (int a = 0; a < half.count; ++a) grad[half.position[a]] = factor * half.grad[a];
}

}  // namespace vtok::VTOK_ISA
