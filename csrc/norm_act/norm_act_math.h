// The element-wise part of norm_act, shared by the CPU and the CUDA kernels.
//
//   normalised n = (x - mean) * rstd,  u = n * weight + bias,  y = u * sigmoid(u)
//   d y / d u = s * (1 + u * (1 - s)),  s = sigmoid(u)
//
// Source: Ba et al. 2016 (layer), Wu & He 2018 (group), Zhang & Sennrich 2019 (rms); SiLU:
// Hendrycks & Gimpel 2016.
#pragma once

#include "../core/approximate.h"
#include "../core/vectorized.h"
#include "norm_act.h"

namespace vtok {

// a * b + c with one rounding where the processor has such an instruction (the builds forbid
// compilers to contract by themselves). Half of all arithmetic here has this form.
template <typename Real>
VTOK_FUNCTION Real multiply_add(Real a, Real b, Real c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// 1 + e^-u. Relative error of e^-u in ulp below 2 + |u| / 8, without fused multiply-add 2 + 0.6
// |u|, and 4 + |u| on a GPU. silu(u) inherits it for negative u only, where it is multiplied by a
// small value. Half the instructions of exp_accurate, which decide the speed here. A CPU clamps
// e^-u to the range in which neither it nor 1 / (1 + e^-u) leaves the normal numbers; a GPU gives
// infinity there, whose reciprocal 0 is as good.
VTOK_FUNCTION float one_plus_exp_minus(float u) {
#if defined(__CUDA_ARCH__)
  return 1.0f + exp2_approximate(u * -1.44269504f);
#else
  // Clamped as integers: GCC makes compares and blends of a float minimum, which must keep NaN.
  const uint32_t bits = float_to_bits(u), magnitude = bits & 0x7fffffffu;
  constexpr uint32_t kBits87 = 0x42ae0000u;
  const float x =
      bits_to_float((magnitude < kBits87 ? magnitude : kBits87) | (~bits & 0x80000000u));
  // e^x = 2^n * 2^f with n = round(x log2(e)), |f| <= 1 / 2.
  constexpr float kMagic = 12582912.0f, kLog2E = 1.44269504f;
  const float shifted = multiply_add(x, kLog2E, kMagic);
  const float f = multiply_add(x, kLog2E, kMagic - shifted);
  // Minimax polynomial of 2^f with constant term 1: relative error 9.1e-8. Pairs of terms first:
  // the processor waits for the longest chain of operations, not for their number.
  const float square = f * f;
  const float low = multiply_add(f, 6.93147004e-1f, 1.0f);
  const float middle = multiply_add(f, 5.55073358e-2f, 2.40222424e-1f);
  const float high = multiply_add(f, 1.32647273e-3f, 9.67151299e-3f);
  const float p = multiply_add(multiply_add(high, square, middle), square, low);
  // The low bits of `shifted` are n; they go into the exponent field.
  return multiply_add(p, bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u), 1.0f);
#endif
}

VTOK_FUNCTION double one_plus_exp_minus(double u) {
  return 1.0 + std::exp(-u);
}

template <typename Real>
VTOK_FUNCTION Real quotient(Real a, Real b) {
#if defined(__CUDA_ARCH__)
  return a * reciprocal_approximate(b);
#else
  return a / b;
#endif
}

template <typename Real>
VTOK_FUNCTION Real silu(Real u) {
  return quotient(u, one_plus_exp_minus(u));
}

// d silu(u) / d u.
template <typename Real>
VTOK_FUNCTION Real silu_slope(Real u) {
  const Real s = quotient(Real(1), one_plus_exp_minus(u));
  return s * multiply_add(u, Real(1) - s, Real(1));
}

// Mean and sum of squared deviations of `count` values; merging needs no second look at them.
template <typename Real>
struct Moments {
  Real count, mean, deviations;
};

// Moments of the union of two sets (Chan et al. 1979). Either may be empty.
template <typename Real>
VTOK_FUNCTION Moments<Real> merge(const Moments<Real>& a, const Moments<Real>& b) {
  const Real count = a.count + b.count;
  const Real share = count > Real(0) ? b.count / count : Real(0);
  const Real delta = b.mean - a.mean;
  return {count, a.mean + delta * share,
          a.deviations + b.deviations + delta * delta * a.count * share};
}

// What normalises values with these moments. Without mean subtraction the mean square, which is
// variance + mean^2, takes the place of the variance and the mean counts as 0.
template <typename Real>
VTOK_FUNCTION void finish_statistics(const Moments<Real>& moments, bool subtract_mean, Real eps,
                                     Real& mean, Real& rstd) {
  const Real variance = moments.deviations / moments.count;
  const Real square = subtract_mean ? variance : variance + moments.mean * moments.mean;
  mean = subtract_mean ? moments.mean : Real(0);
  rstd = Real(1) / std::sqrt(square + eps);
}

// Note [Division by multiplication]
// floor(n / d) = (high32(n * m) + n) >> s for n < 2^31, with s the least number for which
// 2^s >= d and m = floor(2^32 (2^s - d) / d) + 1. A kernel spends 3 instructions instead of some 25
// on each dimension of a row number.
// Source: Granlund & Montgomery 1994, "Division by invariant integers using multiplication".
inline void set_divider(NormActRows& rows, int dim) {
  const uint64_t divisor = static_cast<uint64_t>(rows.sizes[dim]);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < divisor) ++shift;
  rows.shifts[dim] = shift;
  rows.multipliers[dim] =
      static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
}

VTOK_FUNCTION uint32_t divide_row(uint32_t row, const NormActRows& rows, int dim) {
  const uint32_t high = static_cast<uint32_t>((uint64_t{row} * rows.multipliers[dim]) >> 32);
  return (high + row) >> rows.shifts[dim];
}

struct RowOffsets {
  int64_t x, y;
  bool is_first_frame;  // only known when rows.frame_dim >= 0
};

VTOK_FUNCTION RowOffsets row_offsets(const NormActRows& rows, uint32_t row) {
  RowOffsets offsets{0, rows.y_offset, false};
  for (int dim = kNormActMaxDims - 1; dim >= 0; --dim) {  // a constant count: nvcc unrolls it
    if (dim >= rows.num_dims) continue;
    const uint32_t outer = dim == 0 ? 0 : divide_row(row, rows, dim);
    const uint32_t coordinate = row - outer * static_cast<uint32_t>(rows.sizes[dim]);
    offsets.x += int64_t{coordinate} * rows.x_strides[dim];
    offsets.y += int64_t{coordinate} * rows.y_strides[dim];
    if (dim == rows.frame_dim) offsets.is_first_frame = coordinate == 0;
    row = outer;
  }
  return offsets;
}

}  // namespace vtok
