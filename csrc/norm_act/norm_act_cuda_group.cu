// GroupNorm per frame on CUDA, with and without mean subtraction. A block works on one part of a
// frame: neighbouring threads own neighbouring channel vectors, the others further rows. The number
// of parts follows from the shape alone, so that results are the same on every GPU.
//
//   forward    moments of each part -> statistics of each frame and group -> normalise
//   backward   channel sums of each part -> means of each frame and group -> grad_x; weight
//              gradients from the same channel sums
//
// x is read twice in each direction (grad_y too), which statistics over a frame cannot avoid.
#include "norm_act_device.cuh"

namespace vtok {
namespace {

constexpr int64_t kMaxPartsPerFrame = 64;  // 17 frames then make 1,088 blocks: 8 per multiprocessor
constexpr int64_t kMinRowsPerPart = 64;
constexpr int64_t kMaxChannels = 8192;     // 64 KB of shared memory at most

struct Parts {
  int64_t num_frames, per_frame, rows_per_part;
};

Parts make_parts(const NormActLayout& layout) {
  const int64_t rows = layout.rows_per_frame;
  const int64_t share = (rows + kMaxPartsPerFrame - 1) / kMaxPartsPerFrame;
  const int64_t per_part = share > kMinRowsPerPart ? share : kMinRowsPerPart;
  return {layout.buffer.batch * layout.buffer.frames, (rows + per_part - 1) / per_part, per_part};
}

// The rows of a block and the place of a thread in it.
template <int kWidth>
struct Place {
  int64_t frame;
  uint32_t begin, end;  // rows
  int num_vectors, threads_per_row, first_vector, line, num_lines;

  __device__ __forceinline__ Place(const KernelLayout& layout, const Parts& parts) {
    frame = blockIdx.x / parts.per_frame;
    const int64_t first = blockIdx.x % parts.per_frame * parts.rows_per_part;
    const int64_t last = first + parts.rows_per_part;
    begin = static_cast<uint32_t>(frame * layout.rows_per_frame + first);
    end = static_cast<uint32_t>(frame * layout.rows_per_frame +
                                (last < layout.rows_per_frame ? last : layout.rows_per_frame));
    num_vectors = layout.channels / kWidth;
    threads_per_row = num_vectors < kThreads ? num_vectors : kThreads;
    num_lines = kThreads / threads_per_row;
    first_vector = static_cast<int>(threadIdx.x) % threads_per_row;
    line = static_cast<int>(threadIdx.x) / threads_per_row;  // num_lines and above: idle
  }

  // Calls function(channel) for the vectors of this thread.
  template <typename Function>
  __device__ __forceinline__ void for_each_vector(const Function& function) const {
    if (line >= num_lines) return;
    for (int vector = first_vector; vector < num_vectors; vector += threads_per_row) {
      function(vector * kWidth);
    }
  }
};

// Sum of shared memory [lines, C] is done by one thread per result, in the order of lines.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    norm_act_group_moments_kernel(const KernelLayout layout, const Parts parts,
                                  const T* __restrict__ x,         // [rows, C]
                                  float* __restrict__ moments) {   // [blocks, groups, 2]
  VTOK_DYNAMIC_SHARED(float, shared);  // [2, lines, C]
  constexpr int kRows = 4;  // rows whose moments are exact before they are merged
  const Place<kWidth> place(layout, parts);
  float* means = shared;
  float* deviations = shared + place.num_lines * layout.channels;
  place.for_each_vector([&](int channel) {
    Moments<float> running[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) running[i] = {0.0f, 0.0f, 0.0f};
    for (uint32_t row = place.begin + place.line; row < place.end; row += kRows * place.num_lines) {
      float values[kRows][kWidth];
      int count = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t number = row + r * place.num_lines;
        if (number >= place.end) continue;
        load_floats(x, row_offsets(layout.rows, number).x + channel, values[r]);
        ++count;
      }
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

// Entry `which` of [frames, groups, 2] values for the channels of a vector.
template <int kWidth>
__device__ __forceinline__ void load_group_values(const KernelLayout& layout, const float* values,
                                                  int64_t frame, int channel, int which,
                                                  float (&result)[kWidth]) {
  const int width = layout.channels / layout.num_groups;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    result[i] = values[(frame * layout.num_groups + (channel + i) / width) * 2 + which];
  }
}

// What normalises the channels of one vector of one frame.
template <int kWidth>
struct VectorConstants {
  float mean[kWidth], rstd[kWidth], factor[kWidth], summand[kWidth];

  __device__ __forceinline__ VectorConstants(const KernelLayout& layout, const float* stats,
                                             const AnyArray& weight, const AnyArray& bias,
                                             int64_t frame, int channel) {
    load_group_values(layout, stats, frame, channel, 0, mean);
    load_group_values(layout, stats, frame, channel, 1, rstd);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      factor[i] = load_float(weight, channel + i, 1.0f);
      summand[i] = load_float(bias, channel + i, 0.0f);
    }
  }
};

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

// Per part and channel, the sums over its rows of grad_u * n and of grad_u.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    norm_act_group_sums_kernel(const KernelLayout layout, const Parts parts,
                               const AnyArray grad_y,            // [rows, C]
                               const T* __restrict__ x,          // [rows, C]
                               const float* __restrict__ stats,  // [frames, groups, 2]
                               const AnyArray weight,            // [C]
                               const AnyArray bias,              // [C]
                               float* __restrict__ partials) {   // [blocks, 2, C]
  VTOK_DYNAMIC_SHARED(float, shared);  // [lines, 2, C]
  const Place<kWidth> place(layout, parts);
  const int entries = 2 * layout.channels;
  place.for_each_vector([&](int channel) {
    const VectorConstants<kWidth> constants(layout, stats, weight, bias, place.frame, channel);
    float weight_sums[kWidth], bias_sums[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) weight_sums[i] = bias_sums[i] = 0.0f;
    for (uint32_t row = place.begin + place.line; row < place.end; row += place.num_lines) {
      const RowOffsets at = row_offsets(layout.rows, row);
      float values[kWidth], gradient[kWidth];
      load_floats(x, at.x + channel, values);
      load_gradient(layout, grad_y, at, channel, gradient);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float n = (values[i] - constants.mean[i]) * constants.rstd[i];
        const float u = multiply_add(n, constants.factor[i], constants.summand[i]);
        const float grad_u = grad_preactivation(layout.act, u, gradient[i]);
        weight_sums[i] = multiply_add(grad_u, n, weight_sums[i]);
        bias_sums[i] += grad_u;
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      shared[place.line * entries + channel + i] = weight_sums[i];
      shared[place.line * entries + layout.channels + channel + i] = bias_sums[i];
    }
  });
  __syncthreads();
  for (int e = threadIdx.x; e < entries; e += kThreads) {
    float total = 0.0f;
    for (int line = 0; line < place.num_lines; ++line) total += shared[line * entries + e];
    partials[int64_t{blockIdx.x} * entries + e] = total;
  }
}

// A warp per frame and group: the means of grad_n and of grad_n * n over its elements.
__global__ void __launch_bounds__(32)
    norm_act_group_means_kernel(const KernelLayout layout, const Parts parts,
                                const float* __restrict__ partials,  // [blocks, 2, C]
                                const AnyArray weight,               // [C]
                                float* __restrict__ means) {         // [frames, groups, 2]
  const int64_t frame = blockIdx.x / layout.num_groups, g = blockIdx.x % layout.num_groups;
  const int width = layout.channels / layout.num_groups;
  float weighted_sum = 0.0f, projection = 0.0f;
  for (int64_t part = threadIdx.x; part < parts.per_frame; part += 32) {
    const float* sums = partials + (frame * parts.per_frame + part) * 2 * layout.channels;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const float factor = load_float(weight, c, 1.0f);
      projection = multiply_add(sums[c], factor, projection);
      weighted_sum = multiply_add(sums[layout.channels + c], factor, weighted_sum);
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    projection += __shfl_xor_sync(kFullWarp, projection, distance);
    weighted_sum += __shfl_xor_sync(kFullWarp, weighted_sum, distance);
  }
  if (threadIdx.x > 0) return;
  const float share = 1.0f / (static_cast<float>(layout.rows_per_frame) * static_cast<float>(width));
  means[2 * int64_t{blockIdx.x}] = layout.subtract_mean ? weighted_sum * share : 0.0f;
  means[2 * int64_t{blockIdx.x} + 1] = projection * share;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    norm_act_group_backward_kernel(const KernelLayout layout, const Parts parts,
                                   const AnyArray grad_y,            // [rows, C]
                                   const T* __restrict__ x,          // [rows, C]
                                   const float* __restrict__ stats,  // [frames, groups, 2]
                                   const float* __restrict__ means,  // [frames, groups, 2]
                                   const AnyArray weight,            // [C]
                                   const AnyArray bias,              // [C]
                                   T* __restrict__ grad_x) {         // [rows, C]
  const Place<kWidth> place(layout, parts);
  place.for_each_vector([&](int channel) {
    const VectorConstants<kWidth> constants(layout, stats, weight, bias, place.frame, channel);
    float weighted_mean[kWidth], projection[kWidth];
    load_group_values(layout, means, place.frame, channel, 0, weighted_mean);
    load_group_values(layout, means, place.frame, channel, 1, projection);
    for (uint32_t row = place.begin + place.line; row < place.end; row += place.num_lines) {
      const RowOffsets at = row_offsets(layout.rows, row);
      float values[kWidth], gradient[kWidth];
      load_floats(x, at.x + channel, values);
      load_gradient(layout, grad_y, at, channel, gradient);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float n = (values[i] - constants.mean[i]) * constants.rstd[i];
        const float u = multiply_add(n, constants.factor[i], constants.summand[i]);
        const float grad_n =
            grad_preactivation(layout.act, u, gradient[i]) * constants.factor[i];
        values[i] = constants.rstd[i] * multiply_add(-n, projection[i], grad_n - weighted_mean[i]);
      }
      store_floats(grad_x, int64_t{row} * layout.channels + channel, values);
    }
  });
}

// Bytes of shared memory [2, lines, C] of a block whose threads own `width` channels.
unsigned shared_bytes(const NormActLayout& layout, int width) {
  const int64_t vectors = layout.channels / width;
  const int64_t lines = vectors < kThreads ? kThreads / vectors : 1;
  return static_cast<unsigned>(2 * lines * layout.channels * static_cast<int64_t>(sizeof(float)));
}

unsigned checked_grid(int64_t blocks) {
  VTOK_CHECK_VALUE(blocks <= 0x7fffffff, "norm_act: x has too many frames for one launch");
  return static_cast<unsigned>(blocks);
}

void check_channels(const NormActLayout& layout) {
  VTOK_CHECK_VALUE(layout.channels <= kMaxChannels, "norm_act: x must have at most ", kMaxChannels,
                   " channels for group norms on CUDA, got ", layout.channels);
}

// Calls function(width), an integral constant: the channels that a thread owns.
template <typename T, typename Function>
void dispatch_width(bool vectors, const Function& function) {
  if (vectors) return function(std::integral_constant<int, 16 / sizeof(T)>{});
  function(std::integral_constant<int, 1>{});
}

}  // namespace

int64_t norm_act_workspace_groups(const NormActLayout& layout, bool backward) {
  const Parts parts = make_parts(layout);
  const int64_t blocks = parts.num_frames * parts.per_frame;
  return backward ? 2 * (blocks * layout.channels + parts.num_frames * layout.num_groups)
                  : 2 * blocks * layout.num_groups;
}

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

void norm_act_backward_groups(const NormActBackward& params, Stream stream) {
  const NormActLayout& layout = params.layout;
  check_channels(layout);
  const KernelLayout kernel = kernel_layout(layout);
  const Parts parts = make_parts(layout);
  const unsigned blocks = checked_grid(parts.num_frames * parts.per_frame);
  const AnyArray grad_y = any_array(params.grad_y);
  const AnyArray weight = any_array(params.weight), bias = any_array(params.bias);
  const float* stats = params.stats.data_as<float>();
  float* partials = params.workspace.data_as<float>();          // [blocks, 2, C]
  float* means = partials + 2 * int64_t{blocks} * layout.channels;  // [frames, groups, 2]
  dispatch_floating_cuda("norm_act", "x", params.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kFull = 16 / sizeof(T);
    const bool vectors = has_vector_rows(layout, kFull) && is_aligned(params.x, kFull) &&
                         is_aligned(params.grad_y, kFull) && is_aligned(params.grad_x, kFull);
    const T* x = params.x.data_as<T>();
    dispatch_width<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      VTOK_LAUNCH((norm_act_group_sums_kernel<T, kWidth>), dim3(blocks), dim3(kThreads),
                  shared_bytes(layout, kWidth), stream, kernel, parts, grad_y, x, stats, weight,
                  bias, partials);
      if (params.grad_x.data == nullptr) return;
      VTOK_LAUNCH(norm_act_group_means_kernel,
                  dim3(checked_grid(parts.num_frames * layout.num_groups)), dim3(32), 0, stream,
                  kernel, parts, static_cast<const float*>(partials), weight, means);
      VTOK_LAUNCH((norm_act_group_backward_kernel<T, kWidth>), dim3(blocks), dim3(kThreads), 0,
                  stream, kernel, parts, grad_y, x, stats, static_cast<const float*>(means), weight,
                  bias, params.grad_x.data_as<T>());
    });
  });
  if (params.grad_weight.data != nullptr || params.grad_bias.data != nullptr) {
    launch_sum_partials(params, partials, blocks, stream);
  }
}

}  // namespace vtok
