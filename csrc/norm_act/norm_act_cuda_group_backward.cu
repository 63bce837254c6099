// GroupNorm per frame on CUDA, backward: channel sums of each part -> means of each frame and group
// -> grad_x; weight gradients from the same channel sums. x and grad_y are read twice.
#include "norm_act_group.cuh"

namespace vtok {
namespace {

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
  VTOK_DYNAMIC_SHARED(float, shared);                            // [lines, 2, C]
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
  const float share =
      1.0f / (static_cast<float>(layout.rows_per_frame) * static_cast<float>(width));
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
        const float grad_n = grad_preactivation(layout.act, u, gradient[i]) * constants.factor[i];
        values[i] = constants.rstd[i] * multiply_add(-n, projection[i], grad_n - weighted_mean[i]);
      }
      store_floats(grad_x, int64_t{row} * layout.channels + channel, values);
    }
  });
}

}  // namespace

int64_t norm_act_workspace_groups(const NormActLayout& layout, bool backward) {
  const Parts parts = make_parts(layout);
  const int64_t blocks = parts.num_frames * parts.per_frame;
  return backward ? 2 * (blocks * layout.channels + parts.num_frames * layout.num_groups)
                  : 2 * blocks * layout.num_groups;
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
  float* partials = params.workspace.data_as<float>();              // [blocks, 2, C]
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
