// GroupNorm per frame on the CPU, with and without mean subtraction. A frame is cut into slices of
// kSliceRows rows; their moments or sums are merged in order. Included by norm_act_cpu.cpp only.
#pragma once

#include "norm_act_cpu_layer.h"

namespace vtok::VTOK_ISA {

// Rows per unit of work: at 128 channels a slice is 512 KB, 30 us of memory traffic or more.
constexpr int64_t kSliceRows = 1024;
// Rows looked at twice for their mean and their deviations: at 512 channels 64 KB, which fits L2.
constexpr int64_t kMomentRows = 32;

static int64_t slices_per_frame(const NormActLayout& layout) {
  return (layout.rows_per_frame + kSliceRows - 1) / kSliceRows;
}

static int64_t num_frames(const NormActLayout& layout) {
  return layout.buffer.batch * layout.buffer.frames;
}

// Calls function(frame, slice number, first row, end row) for every slice of every frame.
template <typename Function>
static void for_each_slice(const NormActLayout& layout, int num_threads, const Function& function) {
  const int64_t per_frame = slices_per_frame(layout);
  parallel_for(num_frames(layout) * per_frame, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t frame = slice / per_frame;
      const int64_t first = slice % per_frame * kSliceRows;
      const int64_t last = first + kSliceRows;
      function(frame, slice, frame * layout.rows_per_frame + first,
               frame * layout.rows_per_frame +
                   (last < layout.rows_per_frame ? last : layout.rows_per_frame));
    }
  });
}

// Moments of every group over up to kMomentRows rows [rows, C].
template <typename Real>
static void group_moments(const Real* const* rows, int64_t num_rows, int64_t channels,
                          int64_t num_groups, Real* sums, Real* means, Moments<double>* moments) {
  const int64_t width = channels / num_groups;
  const Real count = static_cast<Real>(num_rows * width);
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    const Real* row = rows[i];
    VTOK_SIMD
    for (int64_t c = 0; c < channels; ++c) sums[c] += row[c];
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    const Real mean = sum(sums + g * width, width) / count;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) means[c] = mean;
  }
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    const Real* row = rows[i];
    VTOK_SIMD
    for (int64_t c = 0; c < channels; ++c) {
      const Real deviation = row[c] - means[c];
      sums[c] = multiply_add(deviation, deviation, sums[c]);
    }
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    const Moments<double> more{static_cast<double>(count), static_cast<double>(means[g * width]),
                               static_cast<double>(sum(sums + g * width, width))};
    moments[g] = merge(moments[g], more);
  }
}

template <typename T>
static void slice_moments(const NormActForward& params, int64_t begin, int64_t end,
                          Moments<double>* moments) {
  using Real = real<T>;
  const NormActLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const T* x = params.x.data_as<T>();
  std::vector<Real> scratch(static_cast<size_t>(channels * (kMomentRows + 2)));
  Real* sums = scratch.data() + channels * kMomentRows;
  const Real* rows[kMomentRows];
  int64_t count = 0;
  const auto merge_rows = [&] {
    group_moments(rows, count, channels, layout.num_groups, sums, sums + channels, moments);
    count = 0;
  };
  // Always kMomentRows at once, across runs: how y is laid out must not show in the last bits.
  for_each_run(layout.rows, begin, end, [&](const Run& run) {
    for (int64_t i = 0; i < run.count; ++i) {
      rows[count] =
          as_real(x + run.x + i * run.x_stride, scratch.data() + count * channels, channels);
      if (++count == kMomentRows) merge_rows();
    }
  });
  if (count > 0) merge_rows();
}

// Writes mean and 1 / deviation of every frame and group to `stats` [frames, groups, 2].
template <typename T>
static void group_statistics(const NormActForward& params) {
  using Real = real<T>;
  const NormActLayout& layout = params.layout;
  const int64_t num_groups = layout.num_groups, per_frame = slices_per_frame(layout);
  auto* moments = reinterpret_cast<Moments<double>*>(params.workspace.data);  // [slices, groups]
  for_each_slice(layout, params.num_threads,
                 [&](int64_t, int64_t slice, int64_t begin, int64_t end) {
                   Moments<double>* mine = moments + slice * num_groups;
                   for (int64_t g = 0; g < num_groups; ++g) mine[g] = {0, 0, 0};
                   slice_moments<T>(params, begin, end, mine);
                 });
  Real* stats = params.stats.data_as<Real>();
  for (int64_t frame = 0; frame < num_frames(layout); ++frame) {
    for (int64_t g = 0; g < num_groups; ++g) {
      Moments<double> total{0, 0, 0};
      for (int64_t slice = 0; slice < per_frame; ++slice) {
        total = merge(total, moments[(frame * per_frame + slice) * num_groups + g]);
      }
      double mean, rstd;
      finish_statistics(total, subtracts_mean(layout.kind), layout.eps, mean, rstd);
      stats[(frame * num_groups + g) * 2] = static_cast<Real>(mean);
      stats[(frame * num_groups + g) * 2 + 1] = static_cast<Real>(rstd);
    }
  }
}

// Repeats entry `which` of a frame's [groups, 2] values for every channel.
template <typename Real>
static void spread(const Real* frame_values, int which, const NormActLayout& layout,
                   std::vector<Real>& values) {
  const int64_t width = layout.channels / layout.num_groups;
  for (int64_t c = 0; c < layout.channels; ++c) values[c] = frame_values[c / width * 2 + which];
}

template <bool kAct, typename Real, typename O>
VTOK_NOINLINE void normalise_group_row(const Real* row, const Real* mean, const Real* scale,
                                       const Real* bias, O* y, int64_t channels) {
  VTOK_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    const Real u = multiply_add(row[c] - mean[c], scale[c], bias[c]);
    store(y + c, kAct ? silu(u) : u);
  }
}

template <bool kAct, typename T, typename O>
static void group_forward(const NormActForward& params) {
  using Real = real<T>;
  group_statistics<T>(params);
  const NormActLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const std::vector<Real> weight = channel_vector<Real>(params.weight, channels, 1);
  const std::vector<Real> bias = channel_vector<Real>(params.bias, channels, 0);
  const Real* stats = params.stats.data_as<Real>();
  const T* x = params.x.data_as<T>();
  O* y = params.y.data_as<O>();
  for_each_slice(
      layout, params.num_threads, [&](int64_t frame, int64_t, int64_t begin, int64_t end) {
        std::vector<Real> mean(bias), scale(bias), scratch(bias);
        const Real* frame_stats = stats + frame * layout.num_groups * 2;
        spread(frame_stats, 0, layout, mean);
        spread(frame_stats, 1, layout, scale);
        for (int64_t c = 0; c < channels; ++c) scale[c] *= weight[c];
        for_each_run(layout.rows, begin, end, [&](const Run& run) {
          for (int64_t i = 0; i < run.count; ++i) {
            const Real* row = as_real(x + run.x + i * run.x_stride, scratch.data(), channels);
            O* out = y + run.y + i * run.y_stride;
            normalise_group_row<kAct>(row, mean.data(), scale.data(), bias.data(), out, channels);
          }
          copy_to_front(layout.buffer, run, y, channels);
        });
      });
}

// The constants of a frame, one entry per channel.
template <typename Real>
struct FrameConstants {
  std::vector<Real> mean, rstd, weighted_mean, projection;

  explicit FrameConstants(int64_t channels)
      : mean(static_cast<size_t>(channels)), rstd(mean), weighted_mean(mean), projection(mean) {}
};

template <bool kAct, typename Real>
VTOK_NOINLINE void sum_group_row(const Real* row, const Real* gradient, const Real* mean,
                                 const Real* rstd, const Real* weight, const Real* bias,
                                 Real* grad_weight, Real* grad_bias, int64_t channels) {
  VTOK_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    const Real n = (row[c] - mean[c]) * rstd[c];
    const Real grad_u =
        kAct ? gradient[c] * silu_slope(multiply_add(n, weight[c], bias[c])) : gradient[c];
    grad_weight[c] = multiply_add(grad_u, n, grad_weight[c]);
    grad_bias[c] += grad_u;
  }
}

template <bool kAct, typename T, typename Real>
VTOK_NOINLINE void store_grad_group_row(const Real* row, const Real* gradient,
                                        const FrameConstants<Real>& frame, const Real* weight,
                                        const Real* bias, T* grad_x, int64_t channels) {
  const Real* mean = frame.mean.data();
  const Real* rstd = frame.rstd.data();
  const Real* weighted_mean = frame.weighted_mean.data();
  const Real* projection = frame.projection.data();
  VTOK_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    const Real n = (row[c] - mean[c]) * rstd[c];
    const Real grad_u =
        kAct ? gradient[c] * silu_slope(multiply_add(n, weight[c], bias[c])) : gradient[c];
    store(grad_x + c, (grad_u * weight[c] - weighted_mean[c] - n * projection[c]) * rstd[c]);
  }
}

// Calls function(row of x, row of the gradient, row number) for rows [begin, end).
template <typename T, typename O, typename Function>
static void for_each_backward_row(const NormActBackward& params, int64_t begin, int64_t end,
                                  BackwardScratch<real<T>>& scratch, const Function& function) {
  const NormActLayout& layout = params.layout;
  const T* x = params.x.data_as<T>();
  const O* grad_y = params.grad_y.data_as<O>();
  for_each_run(layout.rows, begin, end, [&](const Run& run) {
    for (int64_t i = 0; i < run.count; ++i) {
      function(as_real(x + run.x + i * run.x_stride, scratch.x.data(), layout.channels),
               load_gradient(layout.buffer, run.is_first_frame, grad_y + run.y + i * run.y_stride,
                             scratch.gradient.data(), layout.channels),
               run.first_row + i);
    }
  });
}

// Per frame and group, the means over its elements of grad_n and of grad_n * n, where grad_n is the
// gradient to the normalised value: `means` [frames, groups, 2].
template <typename Real>
static void group_means(const NormActLayout& layout, const std::vector<Real>& weight,
                        const double* parts, Real* means) {
  const int64_t channels = layout.channels, per_frame = slices_per_frame(layout);
  const int64_t width = channels / layout.num_groups;
  const double count = static_cast<double>(width * layout.rows_per_frame);
  for (int64_t frame = 0; frame < num_frames(layout); ++frame) {
    for (int64_t g = 0; g < layout.num_groups; ++g) {
      double weighted_mean = 0, projection = 0;
      for (int64_t slice = 0; slice < per_frame; ++slice) {
        const double* part = parts + (frame * per_frame + slice) * 2 * channels;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          projection += part[c] * static_cast<double>(weight[c]);
          weighted_mean += part[channels + c] * static_cast<double>(weight[c]);
        }
      }
      Real* mean = means + (frame * layout.num_groups + g) * 2;
      mean[0] = subtracts_mean(layout.kind) ? static_cast<Real>(weighted_mean / count) : Real(0);
      mean[1] = static_cast<Real>(projection / count);
    }
  }
}

template <bool kAct, typename T, typename O>
static void group_backward(const NormActBackward& params) {
  using Real = real<T>;
  const NormActLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const int64_t num_slices = num_frames(layout) * slices_per_frame(layout);
  const std::vector<Real> weight = channel_vector<Real>(params.weight, channels, 1);
  const std::vector<Real> bias = channel_vector<Real>(params.bias, channels, 0);
  const Real* stats = params.stats.data_as<Real>();
  double* parts = reinterpret_cast<double*>(params.workspace.data);  // [slices, 2, C]
  for_each_slice(
      layout, params.num_threads, [&](int64_t frame, int64_t slice, int64_t begin, int64_t end) {
        BackwardScratch<Real> scratch(channels, 1);
        FrameConstants<Real> constants(channels);
        spread(stats + frame * layout.num_groups * 2, 0, layout, constants.mean);
        spread(stats + frame * layout.num_groups * 2, 1, layout, constants.rstd);
        double* totals = parts + slice * 2 * channels;
        for (int64_t c = 0; c < 2 * channels; ++c) totals[c] = 0;
        for_each_backward_row<T, O>(
            params, begin, end, scratch, [&](const Real* row, const Real* gradient, int64_t r) {
              sum_group_row<kAct>(row, gradient, constants.mean.data(), constants.rstd.data(),
                                  weight.data(), bias.data(), scratch.grad_weight.data(),
                                  scratch.grad_bias.data(), channels);
              if ((r + 1) % kRowsPerFlush == 0) flush(scratch, totals, channels);
            });
        flush(scratch, totals, channels);
      });
  sum_parts(params, parts, num_slices);
  if (params.grad_x.data == nullptr) return;

  Real* means = reinterpret_cast<Real*>(parts + num_slices * 2 * channels);  // [frames, groups, 2]
  group_means(layout, weight, parts, means);
  T* grad_x = params.grad_x.data_as<T>();
  for_each_slice(
      layout, params.num_threads, [&](int64_t frame, int64_t, int64_t begin, int64_t end) {
        BackwardScratch<Real> scratch(channels, 1);
        FrameConstants<Real> constants(channels);
        spread(stats + frame * layout.num_groups * 2, 0, layout, constants.mean);
        spread(stats + frame * layout.num_groups * 2, 1, layout, constants.rstd);
        spread(means + frame * layout.num_groups * 2, 0, layout, constants.weighted_mean);
        spread(means + frame * layout.num_groups * 2, 1, layout, constants.projection);
        for_each_backward_row<T, O>(
            params, begin, end, scratch, [&](const Real* row, const Real* gradient, int64_t r) {
              store_grad_group_row<kAct>(row, gradient, constants, weight.data(), bias.data(),
                                         grad_x + r * channels, channels);
            });
      });
}

}  // namespace vtok::VTOK_ISA
