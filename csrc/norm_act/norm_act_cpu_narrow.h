// LayerNorm and RMS norm of few channels on the CPU. A row is shorter than a vector register, so
// that lanes are rows: a block is transposed, [C, lanes], and every sum over channels is a sum of
// vectors. Included by norm_act_cpu_layer.h only.
#pragma once

#include "norm_act_cpu_rows.h"

namespace vtok::VTOK_ISA {

constexpr int64_t kLanes = 16;
// Measured, one thread, 4 x 20 x 32 x 32, float32, ms of rows by themselves / here: 4 channels
// forward 2.2 / 0.7, backward 3.4 / 1.3; 8 channels 2.0 / 0.9 and 5.1 / 2.1; 16 channels 2.0 / 1.6
// and 2.7 / 3.9.
constexpr int64_t kNarrowChannels = kLanes - 1;

// [C, kLanes].
template <typename Real>
using Columns = Real[kNarrowChannels * kLanes];

// Row i of `columns`: `row` [C].
template <typename Real, typename T>
VTOK_FUNCTION void put_row(Real* columns, int64_t i, const T* row, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) columns[c * kLanes + i] = static_cast<Real>(load(row + c));
}

// Lanes without a row repeat the first: whatever comes of them is finite if that row's is.
template <typename Real>
VTOK_FUNCTION void repeat_first_lane(Real* columns, int64_t num_rows, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = num_rows; i < kLanes; ++i) columns[c * kLanes + i] = columns[c * kLanes];
  }
}

template <typename Real>
struct LaneStatistics {
  Real mean[kLanes], rstd[kLanes];

  void find(const Real* x, int64_t channels, bool subtract_mean, Real eps) {
    const Real share = Real(1) / static_cast<Real>(channels);
    for (int64_t i = 0; i < kLanes; ++i) mean[i] = rstd[i] = 0;
    if (subtract_mean) {
      for (int64_t c = 0; c < channels; ++c) {
        VTOK_SIMD
        for (int64_t i = 0; i < kLanes; ++i) mean[i] += x[c * kLanes + i];
      }
    }
    VTOK_SIMD
    for (int64_t i = 0; i < kLanes; ++i) mean[i] *= share;
    for (int64_t c = 0; c < channels; ++c) {
      VTOK_SIMD
      for (int64_t i = 0; i < kLanes; ++i) {
        const Real deviation = x[c * kLanes + i] - mean[i];
        rstd[i] = multiply_add(deviation, deviation, rstd[i]);
      }
    }
    VTOK_SIMD
    for (int64_t i = 0; i < kLanes; ++i) rstd[i] = Real(1) / std::sqrt(rstd[i] * share + eps);
  }

  // `stats` [rows, 2].
  void store_statistics(Real* stats, int64_t num_rows) const {
    for (int64_t i = 0; i < num_rows; ++i) {
      stats[2 * i] = mean[i];
      stats[2 * i + 1] = rstd[i];
    }
  }

  void load_statistics(const Real* stats, int64_t num_rows) {
    for (int64_t i = 0; i < kLanes; ++i) {
      mean[i] = stats[i < num_rows ? 2 * i : 0];
      rstd[i] = stats[i < num_rows ? 2 * i + 1 : 1];
    }
  }
};

// Normalises the rows of a block, up to kLanes; `stats` [rows, 2] is filled unless null.
template <bool kAct, typename T, typename O, typename Real>
VTOK_NOINLINE void narrow_forward_block(const Run& run, const T* x, const Real* weight,
                                        const Real* bias, bool subtract_mean, Real eps, Real* stats,
                                        O* y, int64_t channels) {
  Columns<Real> columns;
  for (int64_t i = 0; i < run.count; ++i) {
    put_row(columns, i, x + run.x + i * run.x_stride, channels);
  }
  repeat_first_lane(columns, run.count, channels);
  LaneStatistics<Real> lanes;
  lanes.find(columns, channels, subtract_mean, eps);
  if (stats != nullptr) lanes.store_statistics(stats, run.count);
  for (int64_t c = 0; c < channels; ++c) {
    Real* column = columns + c * kLanes;
    VTOK_SIMD
    for (int64_t i = 0; i < kLanes; ++i) {
      const Real u = multiply_add((column[i] - lanes.mean[i]) * lanes.rstd[i], weight[c], bias[c]);
      column[i] = kAct ? silu(u) : u;
    }
  }
  for (int64_t i = 0; i < run.count; ++i) {
    O* out = y + run.y + i * run.y_stride;
    for (int64_t c = 0; c < channels; ++c) store(out + c, columns[c * kLanes + i]);
  }
}

// The way back of a block whose rows' gradients are at hand; see RowGradient. `grad_x`, null or
// that of the block's first row, is written; the sums over rows for weight and bias are added to.
template <bool kAct, typename T, typename Real>
VTOK_NOINLINE void narrow_backward_block(Columns<Real>& x, Columns<Real>& gradient,
                                         const LaneStatistics<Real>& lanes, const Real* weight,
                                         const Real* bias, bool subtract_mean, T* grad_x,
                                         int64_t num_rows, Real* grad_weight, Real* grad_bias,
                                         int64_t channels) {
  Real weighted_sum[kLanes] = {}, projection[kLanes] = {};
  for (int64_t c = 0; c < channels; ++c) {
    Real* n = x + c * kLanes;
    Real* weighted = gradient + c * kLanes;
    Real weight_total = 0, bias_total = 0;
    VTOK_SIMD_SUM(weight_total, bias_total)
    for (int64_t i = 0; i < kLanes; ++i) {
      n[i] = (n[i] - lanes.mean[i]) * lanes.rstd[i];
      const Real grad_u =
          kAct ? weighted[i] * silu_slope(multiply_add(n[i], weight[c], bias[c])) : weighted[i];
      weight_total = multiply_add(grad_u, n[i], weight_total);
      bias_total += grad_u;
      weighted[i] = grad_u * weight[c];
      weighted_sum[i] += weighted[i];
      projection[i] = multiply_add(weighted[i], n[i], projection[i]);
    }
    grad_weight[c] += weight_total;
    grad_bias[c] += bias_total;
  }
  if (grad_x == nullptr) return;
  const Real share = Real(1) / static_cast<Real>(channels);
  Real offset[kLanes], slope[kLanes];
  VTOK_SIMD
  for (int64_t i = 0; i < kLanes; ++i) {
    offset[i] = subtract_mean ? -weighted_sum[i] * share : Real(0);
    slope[i] = -projection[i] * share;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const Real* n = x + c * kLanes;
    Real* weighted = gradient + c * kLanes;
    VTOK_SIMD
    for (int64_t i = 0; i < kLanes; ++i) {
      weighted[i] = multiply_add(n[i], slope[i], weighted[i] + offset[i]) * lanes.rstd[i];
    }
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      store(grad_x + i * channels + c, gradient[c * kLanes + i]);
    }
  }
}

}  // namespace vtok::VTOK_ISA
