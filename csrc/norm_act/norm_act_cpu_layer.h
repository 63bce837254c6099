// LayerNorm and RMS norm on the CPU: rows are independent, each stays in the L1 cache while it is
// looked at three times. Included by norm_act_cpu.cpp only.
#pragma once

#include "norm_act_cpu_rows.h"

namespace vtok::VTOK_ISA {

// Elements below which a second thread costs more than it gains (about 5 us of work).
constexpr int64_t kGrainElements = 16384;
// Parts into which the sums of the weight gradients are split, whatever the number of threads.
constexpr int64_t kMaxParts = 256;
constexpr int64_t kMinRowsPerPart = 64;
// Rows summed in the type of the arithmetic before the sum is added to a double: errors of thousands
// of float additions would show.
constexpr int64_t kRowsPerFlush = 64;

static int64_t row_grain(int64_t channels) {
  return channels >= kGrainElements ? 1 : kGrainElements / channels;
}

template <typename Real>
VTOK_FUNCTION void layer_statistics(const Real* row, int64_t channels, bool subtract_mean, Real eps,
                                    Real& mean, Real& rstd) {
  const Real count = static_cast<Real>(channels);
  mean = subtract_mean ? sum(row, channels) / count : Real(0);
  rstd = Real(1) / std::sqrt(sum_squared_deviations(row, channels, mean) / count + eps);
}

template <bool kAct, typename Real, typename O>
VTOK_FUNCTION void normalise_row(const Real* row, const Real* weight, const Real* bias, Real mean,
                                 Real rstd, O* y, int64_t channels) {
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const Real u = (row[c] - mean) * rstd * weight[c] + bias[c];
    store(y + c, kAct ? silu(u) : u);
  }
}

template <bool kAct, typename T, typename O>
static void layer_forward(const NormActForward& params) {
  using Real = real<T>;
  const NormActLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const bool subtract_mean = subtracts_mean(layout.kind);
  const Real eps = static_cast<Real>(layout.eps);
  const std::vector<Real> weight = channel_vector<Real>(params.weight, channels, 1);
  const std::vector<Real> bias = channel_vector<Real>(params.bias, channels, 0);
  const T* x = params.x.data_as<T>();
  O* y = params.y.data_as<O>();
  parallel_for(
      layout.rows.num_rows, row_grain(channels), params.num_threads,
      [&](int64_t begin, int64_t end) {
        std::vector<Real> scratch(static_cast<size_t>(channels));
        for_each_run(layout.rows, begin, end, [&](const Run& run) {
          for (int64_t i = 0; i < run.count; ++i) {
            const Real* row = as_real(x + run.x + i * run.x_stride, scratch.data(), channels);
            O* out = y + run.y + i * run.y_stride;
            Real mean, rstd;
            layer_statistics(row, channels, subtract_mean, eps, mean, rstd);
            normalise_row<kAct>(row, weight.data(), bias.data(), mean, rstd, out, channels);
            copy_to_front(layout.buffer, run.is_first_frame, out, channels);
          }
        });
      });
}

static int64_t layer_parts(int64_t num_rows) {
  const int64_t parts = (num_rows + kMinRowsPerPart - 1) / kMinRowsPerPart;
  return parts < kMaxParts ? parts : kMaxParts;
}

// What one thread needs to go through rows backwards.
template <typename Real>
struct BackwardScratch {
  std::vector<Real> x, gradient, normalised, weighted, grad_weight, grad_bias;

  explicit BackwardScratch(int64_t channels)
      : x(static_cast<size_t>(channels)),
        gradient(x),
        normalised(x),
        weighted(x),
        grad_weight(x),
        grad_bias(x) {}
};

// Adds the sums of the latest rows to `totals` [2, C] and clears them.
template <typename Real>
static void flush(BackwardScratch<Real>& scratch, double* totals, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    totals[c] += static_cast<double>(scratch.grad_weight[c]);
    totals[channels + c] += static_cast<double>(scratch.grad_bias[c]);
    scratch.grad_weight[c] = scratch.grad_bias[c] = 0;
  }
}

// With u = n * weight + bias: the gradient to n in `weighted`, n itself in `normalised`, and the
// sums over rows for weight and bias.
template <bool kAct, typename Real>
VTOK_FUNCTION void backward_row(const Real* __restrict row, const Real* __restrict gradient,
                                const Real* __restrict weight, const Real* __restrict bias,
                                Real mean, Real rstd, Real* __restrict normalised,
                                Real* __restrict weighted, Real* __restrict grad_weight,
                                Real* __restrict grad_bias, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const Real n = (row[c] - mean) * rstd;
    const Real u = n * weight[c] + bias[c];
    const Real grad_u = kAct ? gradient[c] * silu_slope(u) : gradient[c];
    normalised[c] = n;
    weighted[c] = grad_u * weight[c];
    grad_weight[c] += grad_u * n;
    grad_bias[c] += grad_u;
  }
}

template <typename T, typename Real>
VTOK_FUNCTION void store_grad_row(const Real* __restrict normalised, const Real* __restrict weighted,
                                  Real weighted_mean, Real projection, Real rstd,
                                  T* __restrict grad_x, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    store(grad_x + c, (weighted[c] - weighted_mean - normalised[c] * projection) * rstd);
  }
}

template <bool kAct, typename T, typename O>
static void layer_backward_rows(const NormActBackward& params, const std::vector<real<T>>& weight,
                                const std::vector<real<T>>& bias, int64_t begin, int64_t end,
                                BackwardScratch<real<T>>& scratch, double* totals) {
  using Real = real<T>;
  const NormActLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const Real count = static_cast<Real>(channels), eps = static_cast<Real>(layout.eps);
  const bool subtract_mean = subtracts_mean(layout.kind);
  const T* x = params.x.data_as<T>();
  const O* grad_y = params.grad_y.data_as<O>();
  T* grad_x = params.grad_x.data == nullptr ? nullptr : params.grad_x.data_as<T>();
  for_each_run(layout.rows, begin, end, [&](const Run& run) {
    for (int64_t i = 0; i < run.count; ++i) {
      const Real* row = as_real(x + run.x + i * run.x_stride, scratch.x.data(), channels);
      const Real* gradient =
          load_gradient(layout.buffer, run.is_first_frame, grad_y + run.y + i * run.y_stride,
                        scratch.gradient.data(), channels);
      Real mean, rstd;
      layer_statistics(row, channels, subtract_mean, eps, mean, rstd);
      backward_row<kAct>(row, gradient, weight.data(), bias.data(), mean, rstd,
                         scratch.normalised.data(), scratch.weighted.data(),
                         scratch.grad_weight.data(), scratch.grad_bias.data(), channels);
      if (grad_x != nullptr) {
        const Real weighted_mean =
            subtract_mean ? sum(scratch.weighted.data(), channels) / count : Real(0);
        const Real projection =
            dot(scratch.weighted.data(), scratch.normalised.data(), channels) / count;
        store_grad_row(scratch.normalised.data(), scratch.weighted.data(), weighted_mean,
                       projection, rstd, grad_x + (run.first_row + i) * channels, channels);
      }
      if ((run.first_row + i + 1) % kRowsPerFlush == 0) flush(scratch, totals, channels);
    }
  });
}

// Sums `num_parts` x [2, C] into the gradients of weight and bias, in the order of the parts.
static void sum_parts(const NormActBackward& params, const double* parts, int64_t num_parts) {
  const int64_t channels = params.layout.channels;
  std::vector<double> totals(static_cast<size_t>(2 * channels));
  for (int64_t part = 0; part < num_parts; ++part) {
    for (int64_t c = 0; c < 2 * channels; ++c) totals[c] += parts[part * 2 * channels + c];
  }
  if (params.grad_weight.data != nullptr)
    store_channel_vector(params.grad_weight, totals.data(), channels);
  if (params.grad_bias.data != nullptr)
    store_channel_vector(params.grad_bias, totals.data() + channels, channels);
}

template <bool kAct, typename T, typename O>
static void layer_backward(const NormActBackward& params) {
  using Real = real<T>;
  const int64_t channels = params.layout.channels;
  const int64_t num_rows = params.layout.rows.num_rows;
  const std::vector<Real> weight = channel_vector<Real>(params.weight, channels, 1);
  const std::vector<Real> bias = channel_vector<Real>(params.bias, channels, 0);
  const int64_t num_parts = layer_parts(num_rows);
  double* parts = reinterpret_cast<double*>(params.workspace.data);
  parallel_for(num_parts, 1, params.num_threads, [&](int64_t first, int64_t last) {
    BackwardScratch<Real> scratch(channels);
    for (int64_t part = first; part < last; ++part) {
      double* totals = parts + part * 2 * channels;
      for (int64_t c = 0; c < 2 * channels; ++c) totals[c] = 0;
      layer_backward_rows<kAct, T, O>(params, weight, bias, num_rows * part / num_parts,
                                      num_rows * (part + 1) / num_parts, scratch, totals);
      flush(scratch, totals, channels);
    }
  });
  sum_parts(params, parts, num_parts);
}

}  // namespace vtok::VTOK_ISA
