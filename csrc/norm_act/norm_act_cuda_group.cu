// GroupNorm per frame on CUDA, with and without mean subtraction, forward: moments of each part ->
// statistics of each frame and group -> normalise. x is read twice, which statistics over a frame
// cannot avoid.
#include "norm_act_group.cuh"

namespace vtok {
namespace {

// Merges the exact moments of `count` of the rows into the moments of each channel.
template <int kRows, int kWidth>
__device__ __forceinline__ void merge_rows(const float (&values)[kRows][kWidth], int count,
                                           Moments<float> (&running)[kWidth]) {
  const float share = 1.0f / static_cast<float>(count);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum += r < count ? values[r][i] : 0.0f;
    const float mean = sum * share;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float deviation = r < count ? values[r][i] - mean : 0.0f;
      squares = multiply_add(deviation, deviation, squares);
    }
    running[i] = merge(running[i], {static_cast<float>(count), mean, squares});
  }
}

// Moments of each part and group: of the channels of a line of threads first, then over lines in
// order.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    norm_act_group_moments_kernel(const KernelLayout layout, const Parts parts,
                                  const T* __restrict__ x,        // [rows, C]
                                  float* __restrict__ moments) {  // [blocks, groups, 2]
  VTOK_DYNAMIC_SHARED(float, shared);                             // [2, lines, C]
  constexpr int kRows = 4;  // rows whose moments are exact before they are merged
  const Place<kWidth> place(layout, parts);
  float* means = shared;
  float* deviations = shared + place.num_lines * layout.channels;
  place.for_each_vector([&](int channel) {
    Moments<float> running[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) running[i] = {0.0f, 0.0f, 0.0f};
    for (uint32_t row = place.begin + place.line; row < place.end; row += kRows * place.num_lines) {
      float values[kRows][kWidth] = {};
      int count = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t number = row + r * place.num_lines;
        if (number >= place.end) continue;
        load_floats(x, row_offsets(layout.rows, number).x + channel, values[r]);
        ++count;
      }
      merge_rows(values, count, running);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      means[place.line * layout.channels + channel + i] = running[i].mean;
      deviations[place.line * layout.channels + channel + i] = running[i].deviations;
    }
  });
  __syncthreads();
  const int width = layout.channels / layout.num_groups;
  const int num_rows = static_cast<int>(place.end - place.begin);
  for (int g = threadIdx.x; g < layout.num_groups; g += kThreads) {
    Moments<float> total{0.0f, 0.0f, 0.0f};
    for (int line = 0; line < place.num_lines; ++line) {
      // Line l took rows l, l + num_lines, ...
      const int count = (num_rows - line + place.num_lines - 1) / place.num_lines;
      for (int c = g * width; c < (g + 1) * width && count > 0; ++c) {
        total = merge(total, {static_cast<float>(count), means[line * layout.channels + c],
                              deviations[line * layout.channels + c]});
      }
    }
    float* result = moments + (int64_t{blockIdx.x} * layout.num_groups + g) * 2;
    result[0] = total.mean;
    result[1] = total.deviations;
  }
}

__global__ void __launch_bounds__(kThreads)
    norm_act_group_statistics_kernel(const KernelLayout layout, const Parts parts,
                                     const float* __restrict__ moments,  // [blocks, groups, 2]
                                     float* __restrict__ stats) {        // [frames, groups, 2]
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (number >= parts.num_frames * layout.num_groups) return;
  const int64_t frame = number / layout.num_groups, g = number % layout.num_groups;
  const float width = static_cast<float>(layout.channels / layout.num_groups);
  Moments<float> total{0.0f, 0.0f, 0.0f};
  for (int64_t part = 0; part < parts.per_frame; ++part) {
    const int64_t left = layout.rows_per_frame - part * parts.rows_per_part;
    const int64_t rows = left < parts.rows_per_part ? left : parts.rows_per_part;
    const float* moment = moments + ((frame * parts.per_frame + part) * layout.num_groups + g) * 2;
    total = merge(total, {static_cast<float>(rows) * width, moment[0], moment[1]});
  }
  finish_statistics(total, layout.subtract_mean, layout.eps, stats[2 * number],
                    stats[2 * number + 1]);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    norm_act_group_forward_kernel(const KernelLayout layout, const Parts parts,
                                  const T* __restrict__ x,          // [rows, C]
                                  const float* __restrict__ stats,  // [frames, groups, 2]
                                  const AnyArray weight,            // [C]
                                  const AnyArray bias,              // [C]
                                  const AnyArray y) {               // [rows, C]
  const Place<kWidth> place(layout, parts);
  place.for_each_vector([&](int channel) {
    const VectorConstants<kWidth> constants(layout, stats, weight, bias, place.frame, channel);
    for (uint32_t row = place.begin + place.line; row < place.end; row += place.num_lines) {
      const RowOffsets at = row_offsets(layout.rows, row);
      float values[kWidth];
      load_floats(x, at.x + channel, values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float n = (values[i] - constants.mean[i]) * constants.rstd[i];
        const float u = multiply_add(n, constants.factor[i], constants.summand[i]);
        values[i] = layout.act ? silu(u) : u;
      }
      store_result(layout, y, at, channel, values);
    }
  });
}

}  // namespace

void norm_act_forward_groups(const NormActForward& params, Stream stream) {
  const NormActLayout& layout = params.layout;
  check_channels(layout);
  const KernelLayout kernel = kernel_layout(layout);
  const Parts parts = make_parts(layout);
  const unsigned blocks = checked_grid(parts.num_frames * parts.per_frame);
  const unsigned group_blocks =
      checked_grid((parts.num_frames * layout.num_groups + kThreads - 1) / kThreads);
  float* moments = params.workspace.data_as<float>();
  float* stats = params.stats.data_as<float>();
  dispatch_floating_cuda("norm_act", "x", params.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kFull = 16 / sizeof(T);
    const bool vectors = has_vector_rows(layout, kFull) && is_aligned(params.x, kFull) &&
                         is_aligned(params.y, kFull);
    const T* x = params.x.data_as<T>();
    dispatch_width<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      VTOK_LAUNCH((norm_act_group_moments_kernel<T, kWidth>), dim3(blocks), dim3(kThreads),
                  shared_bytes(layout, kWidth), stream, kernel, parts, x, moments);
      VTOK_LAUNCH(norm_act_group_statistics_kernel, dim3(group_blocks), dim3(kThreads), 0, stream,
                  kernel, parts, static_cast<const float*>(moments), stats);
      VTOK_LAUNCH((norm_act_group_forward_kernel<T, kWidth>), dim3(blocks), dim3(kThreads), 0,
                  stream, kernel, parts, x, static_cast<const float*>(stats),
                  any_array(params.weight), any_array(params.bias), any_array(params.y));
    });
  });
}

}  // namespace vtok
