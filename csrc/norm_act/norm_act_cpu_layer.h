// LayerNorm and RMS norm on the CPU: rows are independent and stay in the L1 cache while they are
// looked at three times. They go through each step in blocks: the sums of several rows overlap,
// where those of one row would wait for each other. Included by norm_act_cpu.cpp only.
#pragma once

#include "norm_act_cpu_narrow.h"
#include "norm_act_cpu_rows.h"

namespace vtok::VTOK_ISA {

// Elements below which a second thread costs more than it gains (about 5 us of work).
constexpr int64_t kGrainElements = 16384;
// Parts into which the sums of the weight gradients are split, whatever the number of threads.
constexpr int64_t kMaxParts = 128;
constexpr int64_t kMinRowsPerPart = 64;
// Rows summed in the type of the arithmetic before the sum is added to a double: errors of
// thousands of float additions would show.
constexpr int64_t kRowsPerFlush = 64;
// Rows of a block: 8 KB in the type of the arithmetic, so that what the backward pass keeps of a
// block (x, gradient, grad_x) fits an L1 cache of 32 KB.
constexpr int64_t kBlockBytes = 8192;
constexpr int64_t kMaxBlockRows = 16;

template <typename Real>
static int64_t block_rows(int64_t channels) {
  const int64_t rows = kBlockBytes / (channels * static_cast<int64_t>(sizeof(Real)));
  return rows < 1 ? 1 : rows < kMaxBlockRows ? rows : kMaxBlockRows;
}

static int64_t row_grain(int64_t channels) {
  return channels >= kGrainElements ? 1 : kGrainElements / channels;
}

// Rows of a block in the type of the arithmetic, and their statistics.
template <typename Real>
struct Block {
  int64_t num_rows;
  const Real* rows[kMaxBlockRows];
  Real mean[kMaxBlockRows], rstd[kMaxBlockRows];

  VTOK_NOINLINE_MEMBER void find_statistics(int64_t channels, bool subtract_mean, Real eps) {
    const Real share = Real(1) / static_cast<Real>(channels);
    for (int64_t i = 0; i < num_rows; ++i) {
      mean[i] = subtract_mean ? sum(rows[i], channels) * share : Real(0);
    }
    for (int64_t i = 0; i < num_rows; ++i) {
      rstd[i] = sum_squared_deviations(rows[i], channels, mean[i]) * share + eps;
    }
    VTOK_SIMD
    for (int64_t i = 0; i < num_rows; ++i) rstd[i] = Real(1) / std::sqrt(rstd[i]);
  }

  // `stats` [rows, 2], from the block's first row on.
  void store_statistics(Real* stats) const {
    for (int64_t i = 0; i < num_rows; ++i) {
      stats[2 * i] = mean[i];
      stats[2 * i + 1] = rstd[i];
    }
  }

  void load_statistics(const Real* stats) {
    for (int64_t i = 0; i < num_rows; ++i) {
      mean[i] = stats[2 * i];
      rstd[i] = stats[2 * i + 1];
    }
  }
};

// Functions of a block are not inlined: registers for their constants and pointers run out
// otherwise.
template <bool kAct, typename Real, typename O>
VTOK_NOINLINE void normalise_block(const Block<Real>& block, const Real* weight, const Real* bias,
                                   O* y, int64_t y_stride, int64_t channels) {
  for (int64_t i = 0; i < block.num_rows; ++i) {
    const Real* row = block.rows[i];
    O* out = y + i * y_stride;
    const Real mean = block.mean[i], rstd = block.rstd[i];
    VTOK_SIMD
    for (int64_t c = 0; c < channels; ++c) {
      const Real u = multiply_add((row[c] - mean) * rstd, weight[c], bias[c]);
      store(out + c, kAct ? silu(u) : u);
    }
  }
}

// Calls function(Run) for the blocks of rows [begin, end).
template <typename Real, typename Function>
static void for_each_block(const NormActLayout& layout, int64_t begin, int64_t end,
                           const Function& function) {
  const int64_t most = block_rows<Real>(layout.channels);
  for_each_run(layout.rows, begin, end, [&](const Run& run) {
    for (int64_t first = 0; first < run.count; first += most) {
      Run block = run;
      block.x += first * run.x_stride;
      block.y += first * run.y_stride;
      block.first_row += first;
      block.count = run.count - first < most ? run.count - first : most;
      const int64_t left = run.count - first - block.count;
      block.following = left < block.count ? left : block.count;
      function(block);
    }
  });
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
  Real* stats = params.stats.data == nullptr ? nullptr : params.stats.data_as<Real>();
  parallel_for(
      layout.rows.num_rows, row_grain(channels), params.num_threads,
      [&](int64_t begin, int64_t end) {
        std::vector<Real> scratch(static_cast<size_t>(channels * block_rows<Real>(channels)));
        Block<Real> block;
        for_each_block<Real>(layout, begin, end, [&](const Run& run) {
          if (channels <= kNarrowChannels) {
            narrow_forward_block<kAct>(run, x, weight.data(), bias.data(), subtract_mean, eps,
                                       stats == nullptr ? nullptr : stats + 2 * run.first_row, y,
                                       channels);
            copy_to_front(layout.buffer, run, y, channels);
            return;
          }
          block.num_rows = run.count;
          for (int64_t i = 0; i < run.count; ++i) {
            block.rows[i] =
                as_real(x + run.x + i * run.x_stride, scratch.data() + i * channels, channels);
          }
          block.find_statistics(channels, subtract_mean, eps);
          if (stats != nullptr) block.store_statistics(stats + 2 * run.first_row);
          for (int64_t i = 0; i < run.following; ++i) {
            prefetch_row(x + run.x + (run.count + i) * run.x_stride, channels);
          }
          normalise_block<kAct>(block, weight.data(), bias.data(), y + run.y, run.y_stride,
                                channels);
          copy_to_front(layout.buffer, run, y, channels);
        });
      });
}

static int64_t layer_parts(int64_t num_rows) {
  const int64_t parts = (num_rows + kMinRowsPerPart - 1) / kMinRowsPerPart;
  return parts < kMaxParts ? parts : kMaxParts;
}

// What one thread needs to go through rows backwards: `rows` rows of each kind, and the sums.
template <typename Real>
struct BackwardScratch {
  std::vector<Real> x, gradient, weighted, grad_weight, grad_bias;

  BackwardScratch(int64_t channels, int64_t rows)
      : x(static_cast<size_t>(channels * rows)),
        gradient(x),
        weighted(x),
        grad_weight(static_cast<size_t>(channels)),
        grad_bias(grad_weight) {}
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

// A row on its way back: what it reads, its gradient to n = (x - mean) * rstd, and the sums over
// the row of that gradient and of its product with n.
template <typename Real>
struct RowGradient {
  const Real* row;
  const Real* gradient;
  Real mean, rstd;
  Real* weighted;
  Real weighted_sum, projection;
};

// The gradients of u = n * weight + bias and, returned, of n.
template <bool kAct, typename Real>
VTOK_FUNCTION Real grad_normalised(Real n, Real gradient, Real weight, Real bias, Real& grad_u) {
  grad_u = kAct ? gradient * silu_slope(multiply_add(n, weight, bias)) : gradient;
  return grad_u * weight;
}

// Fills `weighted` and the sums of one row (kPair false) or two, and adds to the sums over rows for
// weight and bias. Two rows at a time load and store these half as often.
template <bool kAct, bool kPair, typename Real>
VTOK_FUNCTION void backward_rows(RowGradient<Real>* rows, const Real* __restrict weight,
                                 const Real* __restrict bias, Real* __restrict grad_weight,
                                 Real* __restrict grad_bias, int64_t channels) {
  const Real* __restrict row0 = rows[0].row;
  const Real* __restrict row1 = rows[kPair].row;
  const Real* __restrict gradient0 = rows[0].gradient;
  const Real* __restrict gradient1 = rows[kPair].gradient;
  Real* __restrict weighted0 = rows[0].weighted;
  Real* __restrict weighted1 = rows[kPair].weighted;
  const Real mean0 = rows[0].mean, mean1 = rows[kPair].mean;
  const Real rstd0 = rows[0].rstd, rstd1 = rows[kPair].rstd;
  Real sum0 = 0, sum1 = 0, projection0 = 0, projection1 = 0;
  VTOK_SIMD_SUM(sum0, sum1, projection0, projection1)
  for (int64_t c = 0; c < channels; ++c) {
    Real grad_u;
    const Real n0 = (row0[c] - mean0) * rstd0;
    const Real grad_n0 = grad_normalised<kAct>(n0, gradient0[c], weight[c], bias[c], grad_u);
    weighted0[c] = grad_n0;
    sum0 += grad_n0;
    projection0 = multiply_add(grad_n0, n0, projection0);
    Real weight_total = multiply_add(grad_u, n0, grad_weight[c]);
    Real bias_total = grad_bias[c] + grad_u;
    if constexpr (kPair) {
      const Real n1 = (row1[c] - mean1) * rstd1;
      const Real grad_n1 = grad_normalised<kAct>(n1, gradient1[c], weight[c], bias[c], grad_u);
      weighted1[c] = grad_n1;
      sum1 += grad_n1;
      projection1 = multiply_add(grad_n1, n1, projection1);
      weight_total = multiply_add(grad_u, n1, weight_total);
      bias_total += grad_u;
    }
    grad_weight[c] = weight_total;
    grad_bias[c] = bias_total;
  }
  rows[0].weighted_sum = sum0;
  rows[0].projection = projection0;
  if constexpr (kPair) {
    rows[1].weighted_sum = sum1;
    rows[1].projection = projection1;
  }
}

// `prefetch(i)` fetches row i of the following block: pair by pair, so that memory is asked for no
// more at once than it answers meanwhile.
template <bool kAct, typename Real, typename Prefetch>
VTOK_NOINLINE void backward_block(RowGradient<Real>* rows, int64_t num_rows, const Real* weight,
                                  const Real* bias, Real* grad_weight, Real* grad_bias,
                                  int64_t channels, const Prefetch& prefetch) {
  int64_t i = 0;
  for (; i + 2 <= num_rows; i += 2) {
    prefetch(i);
    prefetch(i + 1);
    backward_rows<kAct, true>(rows + i, weight, bias, grad_weight, grad_bias, channels);
  }
  if (i < num_rows) {
    prefetch(i);
    backward_rows<kAct, false>(rows + i, weight, bias, grad_weight, grad_bias, channels);
  }
}

// grad_x = rstd * (grad_n - mean(grad_n) - n * mean(grad_n * n)).
template <typename T, typename Real>
VTOK_NOINLINE void store_grad_row(const RowGradient<Real>& row, bool subtract_mean, T* grad_x,
                                  int64_t channels) {
  const Real* x = row.row;
  const Real* weighted = row.weighted;  // may be grad_x
  const Real share = Real(1) / static_cast<Real>(channels);
  const Real mean = row.mean, rstd = row.rstd;
  const Real offset = subtract_mean ? -row.weighted_sum * share * rstd : Real(0);
  const Real slope = -row.projection * share * rstd * rstd;
  VTOK_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    store(grad_x + c, multiply_add(x[c] - mean, slope, multiply_add(weighted[c], rstd, offset)));
  }
}

// layer_backward_rows of few channels.
template <bool kAct, typename T, typename O>
static void narrow_backward_rows(const NormActBackward& params, const std::vector<real<T>>& weight,
                                 const std::vector<real<T>>& bias, int64_t begin, int64_t end,
                                 BackwardScratch<real<T>>& scratch, double* totals) {
  using Real = real<T>;
  const NormActLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const bool subtract_mean = subtracts_mean(layout.kind);
  const T* x = params.x.data_as<T>();
  const O* grad_y = params.grad_y.data_as<O>();
  T* grad_x = params.grad_x.data == nullptr ? nullptr : params.grad_x.data_as<T>();
  const Real* stats = params.stats.data == nullptr ? nullptr : params.stats.data_as<Real>();
  Columns<Real> columns, gradients;
  LaneStatistics<Real> lanes;
  int64_t rows_since_flush = 0;
  for_each_block<Real>(layout, begin, end, [&](const Run& run) {
    for (int64_t i = 0; i < run.count; ++i) {
      put_row(columns, i, x + run.x + i * run.x_stride, channels);
      const Real* gradient =
          load_gradient(layout.buffer, run.is_first_frame, grad_y + run.y + i * run.y_stride,
                        scratch.gradient.data(), channels);
      put_row(gradients, i, gradient, channels);
    }
    repeat_first_lane(columns, run.count, channels);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = run.count; i < kLanes; ++i) gradients[c * kLanes + i] = 0;
    }
    if (stats != nullptr) {
      lanes.load_statistics(stats + 2 * run.first_row, run.count);
    } else {
      lanes.find(columns, channels, subtract_mean, static_cast<Real>(layout.eps));
    }
    narrow_backward_block<kAct>(
        columns, gradients, lanes, weight.data(), bias.data(), subtract_mean,
        grad_x == nullptr ? nullptr : grad_x + run.first_row * channels, run.count,
        scratch.grad_weight.data(), scratch.grad_bias.data(), channels);
    rows_since_flush += run.count;
    if (rows_since_flush >= kRowsPerFlush) {
      flush(scratch, totals, channels);
      rows_since_flush = 0;
    }
  });
}

template <bool kAct, typename T, typename O>
static void layer_backward_rows(const NormActBackward& params, const std::vector<real<T>>& weight,
                                const std::vector<real<T>>& bias, int64_t begin, int64_t end,
                                BackwardScratch<real<T>>& scratch, double* totals) {
  if (params.layout.channels <= kNarrowChannels) {
    narrow_backward_rows<kAct, T, O>(params, weight, bias, begin, end, scratch, totals);
    return;
  }
  using Real = real<T>;
  const NormActLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const Real eps = static_cast<Real>(layout.eps);
  const bool subtract_mean = subtracts_mean(layout.kind);
  const T* x = params.x.data_as<T>();
  const O* grad_y = params.grad_y.data_as<O>();
  T* grad_x = params.grad_x.data == nullptr ? nullptr : params.grad_x.data_as<T>();
  const Real* stats = params.stats.data == nullptr ? nullptr : params.stats.data_as<Real>();
  Block<Real> block;
  RowGradient<Real> gradients[kMaxBlockRows];
  int64_t rows_since_flush = 0;
  for_each_block<Real>(layout, begin, end, [&](const Run& run) {
    block.num_rows = run.count;
    for (int64_t i = 0; i < run.count; ++i) {
      block.rows[i] =
          as_real(x + run.x + i * run.x_stride, scratch.x.data() + i * channels, channels);
    }
    if (stats != nullptr) {
      block.load_statistics(stats + 2 * run.first_row);
    } else {
      block.find_statistics(channels, subtract_mean, eps);
    }
    for (int64_t i = 0; i < run.count; ++i) {
      const Real* gradient =
          load_gradient(layout.buffer, run.is_first_frame, grad_y + run.y + i * run.y_stride,
                        scratch.gradient.data() + i * channels, channels);
      // grad_x itself holds the intermediate result where its type allows that: its memory is then
      // fetched during the long first step, instead of holding up the short second one.
      Real* weighted = scratch.weighted.data() + i * channels;
      if constexpr (std::is_same_v<T, Real>) {
        if (grad_x != nullptr) weighted = grad_x + (run.first_row + i) * channels;
      }
      gradients[i] = {block.rows[i], gradient, block.mean[i], block.rstd[i], weighted, 0, 0};
    }
    const auto prefetch = [&](int64_t i) {
      if (i >= run.following) return;
      prefetch_row(x + run.x + (run.count + i) * run.x_stride, channels);
      prefetch_row(grad_y + run.y + (run.count + i) * run.y_stride, channels);
    };
    backward_block<kAct>(gradients, run.count, weight.data(), bias.data(),
                         scratch.grad_weight.data(), scratch.grad_bias.data(), channels, prefetch);
    for (int64_t i = 0; i < run.count && grad_x != nullptr; ++i) {
      store_grad_row(gradients[i], subtract_mean, grad_x + (run.first_row + i) * channels,
                     channels);
    }
    rows_since_flush += run.count;
    if (rows_since_flush >= kRowsPerFlush) {
      flush(scratch, totals, channels);
      rows_since_flush = 0;
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
    BackwardScratch<Real> scratch(channels, block_rows<Real>(channels));
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
