// FSQ of one value, shared by the CPU and the CUDA kernels.
//
//   bounded = tanh(z + shift) * half - offset
//   half = (levels - 1) * (1 + 1e-3) / 2,  offset = 0.5 for even levels else 0
//   shift = atanh(offset / half)
//   level = round(bounded) + half_width,  code = (level - half_width) / half_width
//   index = sum over channels of level * basis
//
// Source: Mentzer et al. 2023, "Finite Scalar Quantization", as varied by VidTok (bound with 1 +
// eps and atanh).
//
// Note [Levels by comparison]
// tanh grows monotonically, so the level is the number of boundaries below z, where boundary k is
// atanh((k + 0.5 - half_width + offset) / half) - shift, rounded once from double. Seven
// comparisons replace a tanh of about 35 cycles per vector, and equal bits on every device come for
// free. Beyond 16 levels tanh is cheaper; see Note [The same bits everywhere] in core/vectorized.h.
#pragma once

#include "../core/approximate.h"
#include "../core/vectorized.h"
#include "fsq.h"

namespace vtok {

// Channel constants in the type of the arithmetic: float, or double for float64 tensors.
template <typename Real>
struct FsqConstants {
  Real shift, half, offset, half_width;
  Real slope;  // half / half_width
};

template <typename Real>
VTOK_FUNCTION FsqConstants<Real> fsq_constants(const FsqChannel& channel) {
  const Real half_width = static_cast<Real>(channel.half_width);
  if constexpr (std::is_same_v<Real, double>) {
    const double half = (channel.levels - 1) * (1.0 + 1e-3) / 2.0;
    const double offset = channel.levels % 2 == 0 ? 0.5 : 0.0;
    return {std::atanh(offset / half), half, offset, half_width, half / half_width};
  } else {
    return {channel.shift, channel.half, channel.offset, half_width, channel.slope};
  }
}

// The level in [0, levels - 1]; 0 for NaN. kBoundaries: how many of the channel's boundaries to
// compare with (7 or 15), or 0 for tanh.
template <int kBoundaries, typename Real, typename Boundary>
VTOK_FUNCTION int32_t fsq_level(Real z, const FsqConstants<Real>& c, const Boundary& boundary) {
  if constexpr (kBoundaries > 0) {
    int32_t level = 0;
    for (int k = 0; k < kBoundaries; ++k) level += z > boundary(k) ? 1 : 0;
    return level;
  } else {
    const Real digit = round_even(tanh_accurate(z + c.shift) * c.half - c.offset);
    return static_cast<int32_t>(digit == digit ? digit + c.half_width : Real(0));
  }
}

// The code of a level, or NaN where z was NaN. kPowerOfTwo: half_width is one, so that multiplying
// by its inverse gives the same bits as dividing.
template <bool kPowerOfTwo = false, typename Real>
VTOK_FUNCTION Real fsq_code(Real z, int32_t level, Real half_width) {
  const Real digit = static_cast<Real>(level) - half_width;
  const Real code = kPowerOfTwo ? digit * (Real(1) / half_width) : digit / half_width;
  return z == z ? code : z;
}

// e^(-2 |x|). A GPU takes its own exponential, relative error 2^-22 + 2^-23 |x|: gradients need not
// have the same bits everywhere, and this is half the time of a backward pass.
VTOK_FUNCTION float exp_minus_twice(float x) {
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
#if defined(__CUDA_ARCH__)
  return exp2_approximate(magnitude * -2.88539008f);
#else
  return exp_accurate(-2.0f * magnitude);
#endif
}

VTOK_FUNCTION double exp_minus_twice(double x) {
  return std::exp(-2.0 * std::abs(x));
}

// d code / d z with the rounding passed straight through: slope * (1 - tanh(x)^2) with
// x = z + shift, as 4 e / (1 + e)^2 with e = e^(-2 |x|), which has no cancellation.
template <typename Real>
VTOK_FUNCTION Real fsq_slope(Real z, const FsqConstants<Real>& c) {
  const Real e = exp_minus_twice(z + c.shift);
#if defined(__CUDA_ARCH__)
  const Real inverse = reciprocal_approximate(Real(1) + e);
#else
  const Real inverse = Real(1) / (Real(1) + e);
#endif
  return (c.slope * Real(4)) * (e * (inverse * inverse));
}

}  // namespace vtok
