// Arithmetic of the FSQ entropy, shared by the CPU and the CUDA kernels.
//
// Levels are counted from the most probable one, `peak`: logits grow linearly with the level, so it
// is the last for z >= 0 and the first for z < 0. With x = level - peak, slope = slope_per_z * z:
//   p = exp(slope * x) / sum,  H = ln sum - slope * E[x],  dH/dz = -slope_per_z * slope * Var[x]
// Nothing is subtracted that is nearly equal: a saturated channel (x = 0, p = 1) gives exact zeros.
//
// Source: VidTok's FSQ regulariser, -sum p ln max(p, 1e-5), without and with the clamp.
#pragma once

#include "../core/vectorized.h"
#include "../fsq/fsq_math.h"
#include "fsq_entropy.h"

namespace vtok {

// The published log argument is clamped here.
constexpr double kFsqEntropyClamp = 1e-5;
constexpr double kFsqEntropyLogClamp = -11.512925464970229;
// Factors below this stand for 0 in logarithms: a product with any probability is far below the
// clamp.
constexpr double kFsqEntropyTiny = 1e-30;

template <typename Real>
VTOK_FUNCTION int fsq_entropy_peak(Real z, const FsqChannel& channel) {
  return z < Real(0) ? 0 : channel.levels - 1;
}

// ln of a factor, for products that are compared with the clamp.
template <typename Real>
VTOK_FUNCTION Real fsq_entropy_log_factor(Real factor) {
  const Real tiny = static_cast<Real>(kFsqEntropyTiny);
  return log_accurate(factor > tiny ? factor : tiny);
}

// -p ln max(p, clamp).
template <typename Real>
VTOK_FUNCTION Real fsq_entropy_term(Real p) {
  const Real clamp = static_cast<Real>(kFsqEntropyClamp);
  return -(p * log_accurate(p > clamp ? p : clamp));
}

// The derivative of fsq_entropy_term: -(ln max(p, clamp) + [p >= clamp]); NaN for NaN.
template <typename Real>
VTOK_FUNCTION Real fsq_entropy_term_slope(Real p) {
  const Real clamp = static_cast<Real>(kFsqEntropyClamp);
  const Real slope = -(log_accurate(p > clamp ? p : clamp) + (p >= clamp ? Real(1) : Real(0)));
  return p == p ? slope : p;
}

// The level that `fsq` rounds to (0 for NaN), with the same bits as there, and z - code.
template <typename Real>
struct FsqEntropyNearest {
  int32_t level;
  Real error;
};

template <typename Real>
VTOK_FUNCTION FsqEntropyNearest<Real> fsq_entropy_nearest(Real z, const FsqChannel& channel) {
  const FsqConstants<Real> c = fsq_constants<Real>(channel);
  const auto boundary = [&](int k) { return static_cast<Real>(channel.boundary[k]); };
  const bool compares = !std::is_same_v<Real, double> && channel.levels <= kFsqMaxCompared;
  const int32_t level =
      compares ? fsq_level<kFsqMaxCompared - 1>(z, c, boundary) : fsq_level<0>(z, c, boundary);
  return {level, z - fsq_code(z, level, c.half_width)};
}

}  // namespace vtok
