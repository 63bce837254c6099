// FSQ of one value, shared by the CPU and the CUDA kernels.
//
//   bounded = tanh(z + shift) * half - offset,   digit = round_half_even(bounded),   code = digit /
//   half_width half = (levels - 1) * (1 + 1e-3) / 2,  offset = 0.5 for even levels else 0,  shift =
//   atanh(offset / half) index = sum over channels of (digit + half_width) * basis
//
// Source: Mentzer et al. 2023, "Finite Scalar Quantization", as varied by VidTok (bound with 1 +
// eps and atanh). No fused multiply-add: see Note [The same bits everywhere] in core/vectorized.h.
#pragma once

#include "../core/vectorized.h"
#include "fsq.h"

namespace vtok {

// Channel constants in the type of the arithmetic: float, or double for float64 tensors.
template <typename Real>
struct FsqConstants {
  Real shift, half, offset, half_width;
};

template <typename Real>
VTOK_FUNCTION FsqConstants<Real> fsq_constants(const FsqChannel& channel) {
  if constexpr (std::is_same_v<Real, double>) {
    const double half = (channel.levels - 1) * (1.0 + 1e-3) / 2.0;
    const double offset = channel.levels % 2 == 0 ? 0.5 : 0.0;
    return {std::atanh(offset / half), half, offset, static_cast<double>(channel.half_width)};
  } else {
    return {channel.shift, channel.half, channel.offset, static_cast<float>(channel.half_width)};
  }
}

// The digit in [-half_width, levels - 1 - half_width], as a real number; NaN for NaN.
template <typename Real>
VTOK_FUNCTION Real fsq_digit(Real z, const FsqConstants<Real>& c) {
  return round_even(tanh_accurate(z + c.shift) * c.half - c.offset);
}

// d code / d z with the rounding passed straight through.
template <typename Real>
VTOK_FUNCTION Real fsq_slope(Real z, const FsqConstants<Real>& c) {
  const Real t = tanh_accurate(z + c.shift);
  return (c.half * (Real(1) - t * t)) / c.half_width;
}

}  // namespace vtok
