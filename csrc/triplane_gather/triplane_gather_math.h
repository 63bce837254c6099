// Arithmetic of the triplane lookup, shared by the CPU and the CUDA kernels.
//
//   u = clamp(coordinate, 0, 1) * (R - 1),  lower = floor(u),  upper = min(lower + 1, R - 1)
//   f = u - lower;  along the columns first, then along the rows:
//   a = p[lower, lower'] * (1 - f') + p[lower, upper'] * f',  b the same in row `upper`
//   feature = a * (1 - f) + b * f
//
// The order of the operations is CoordTok's. Without fused multiply-adds (see Note [The same bits
// everywhere] in core/vectorized.h) float32 features equal its own bit for bit.
#pragma once

#include "../core/half.h"
#include "triplane_gather.h"

namespace vtok {

// Position of a coordinate between two neighbouring cells of one axis.
template <typename Real>
struct AxisPosition {
  int32_t lower;
  int32_t step;   // from the lower to the upper cell: 1, or 0 at the end of the axis
  Real fraction;  // in [0, 1)
};

// Integer positions become coordinates by a true division: multiplying by 1 / (G - 1) would put
// some of them, such as 9 / 127, into the cell before.
template <typename Real, typename Coord>
VTOK_FUNCTION Real triplane_coordinate(Coord value, Real divisor) {
  if constexpr (std::is_integral_v<Coord>) {
    return static_cast<Real>(value) / divisor;
  } else {
    return value;
  }
}

// A NaN coordinate gives cell 0 and a NaN fraction, and with it a NaN feature.
template <typename Real>
VTOK_FUNCTION AxisPosition<Real> triplane_locate(Real coordinate, int32_t resolution) {
  const Real above = coordinate < Real(0) ? Real(0) : coordinate;
  const Real clamped = above > Real(1) ? Real(1) : above;
  const Real position = clamped * static_cast<Real>(resolution - 1);
  const int32_t lower = static_cast<int32_t>(position == position ? position : Real(0));
  return {lower, lower + 1 < resolution ? 1 : 0, position - static_cast<Real>(lower)};
}

// Corners are named (row, column): l lower, u upper. `Value` is Real, or a vector of Reals for
// several channels at a time.
template <typename Value, typename Real>
VTOK_FUNCTION Value triplane_interpolate(Value ll, Value lu, Value ul, Value uu, Real row_fraction,
                                         Real column_fraction) {
  const Value lower_row = ll * (Real(1) - column_fraction) + lu * column_fraction;
  const Value upper_row = ul * (Real(1) - column_fraction) + uu * column_fraction;
  return lower_row * (Real(1) - row_fraction) + upper_row * row_fraction;
}

// d feature / d row fraction and d feature / d column fraction.
template <typename Value, typename Real>
VTOK_FUNCTION Value triplane_row_slope(Value ll, Value lu, Value ul, Value uu,
                                       Real column_fraction) {
  return (ul - ll) * (Real(1) - column_fraction) + (uu - lu) * column_fraction;
}

template <typename Value, typename Real>
VTOK_FUNCTION Value triplane_column_slope(Value ll, Value lu, Value ul, Value uu,
                                          Real row_fraction) {
  return (lu - ll) * (Real(1) - row_fraction) + (uu - ul) * row_fraction;
}

// d clamped position / d coordinate.
template <typename Real>
VTOK_FUNCTION Real triplane_position_slope(Real coordinate, int32_t resolution) {
  const bool inside = coordinate >= Real(0) && coordinate <= Real(1);
  return inside ? static_cast<Real>(resolution - 1) : Real(0);
}

}  // namespace vtok
