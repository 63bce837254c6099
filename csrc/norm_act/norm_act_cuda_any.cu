// LayerNorm and RMS norm on CUDA for any channel count and alignment: a warp per row, one element
// at a time, the row read again from cache for each step. No released model needs these kernels.
#include "norm_act_device.cuh"

namespace vtok {
namespace {

constexpr int kAnyThreads = 32 * kAnyWarps;

// Mean and 1 / deviation of a row that a warp reads element by element.
template <typename T>
__device__ __forceinline__ void any_statistics(const KernelLayout& layout, const T* row,
                                               float& mean, float& rstd) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0.0f, squares = 0.0f;
  for (int c = lane; c < layout.channels; c += 32) sum += to_float(row[c]);
  mean = layout.subtract_mean ? sum_over_lanes<32>(sum) * layout.share : 0.0f;
  for (int c = lane; c < layout.channels; c += 32) {
    const float deviation = to_float(row[c]) - mean;
    squares = multiply_add(deviation, deviation, squares);
  }
  rstd = 1.0f / sqrtf(sum_over_lanes<32>(squares) * layout.share + layout.eps);
}

template <typename T>
__global__ void __launch_bounds__(kAnyThreads)
    norm_act_forward_any_kernel(const KernelLayout layout, const T* __restrict__ x,  // [rows, C]
                                const AnyArray weight, const AnyArray bias, const AnyArray y,
                                float* stats) {  // [rows, 2] or null
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t num_rows = static_cast<uint32_t>(layout.rows.num_rows);
  for (uint32_t row = blockIdx.x * kAnyWarps + threadIdx.x / 32; row < num_rows;
       row += gridDim.x * kAnyWarps) {
    const RowOffsets at = row_offsets(layout.rows, row);
    float mean, rstd;
    any_statistics(layout, x + at.x, mean, rstd);
    if (stats != nullptr && lane == 0) store_statistics(stats, row, mean, rstd);
    for (int c = lane; c < layout.channels; c += 32) {
      const float n = (to_float(x[at.x + c]) - mean) * rstd;
      const float u = multiply_add(n, load_float(weight, c, 1.0f), load_float(bias, c, 0.0f));
      const float result[1] = {layout.act ? silu(u) : u};
      store_result(layout, y, at, c, result);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kAnyThreads)
    norm_act_backward_any_kernel(const KernelLayout layout, const AnyArray grad_y,
                                 const T* __restrict__ x,  // [rows, C]
                                 const AnyArray weight, const AnyArray bias,
                                 T* __restrict__ grad_x,  // [rows, C] or null
                                 float* partials) {       // [warps, 2, C] or null
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t warp = blockIdx.x * kAnyWarps + threadIdx.x / 32;
  const uint32_t num_rows = static_cast<uint32_t>(layout.rows.num_rows);
  float* sums = partials == nullptr ? nullptr : partials + int64_t{warp} * 2 * layout.channels;
  // Each lane reads and writes its own channels of `sums`: no other thread looks at them.
  for (int c = lane; sums != nullptr && c < layout.channels; c += 32) {
    sums[c] = sums[layout.channels + c] = 0.0f;
  }
  for (uint32_t row = warp; row < num_rows; row += gridDim.x * kAnyWarps) {
    const RowOffsets at = row_offsets(layout.rows, row);
    float mean, rstd;
    any_statistics(layout, x + at.x, mean, rstd);
    const auto grad_normalised = [&](int c, float& n, float& grad_u) {
      float gradient[1];
      load_gradient(layout, grad_y, at, c, gradient);
      const float factor = load_float(weight, c, 1.0f);
      n = (to_float(x[at.x + c]) - mean) * rstd;
      const float u = multiply_add(n, factor, load_float(bias, c, 0.0f));
      grad_u = grad_preactivation(layout.act, u, gradient[0]);
      return grad_u * factor;
    };
    float weighted_sum = 0.0f, projection = 0.0f, n, grad_u;
    for (int c = lane; c < layout.channels; c += 32) {
      const float grad_n = grad_normalised(c, n, grad_u);
      weighted_sum += grad_n;
      projection = multiply_add(grad_n, n, projection);
      if (sums != nullptr) {
        sums[c] = multiply_add(grad_u, n, sums[c]);
        sums[layout.channels + c] += grad_u;
      }
    }
    projection = sum_over_lanes<32>(projection) * layout.share;
    weighted_sum = layout.subtract_mean ? sum_over_lanes<32>(weighted_sum) * layout.share : 0.0f;
    for (int c = lane; grad_x != nullptr && c < layout.channels; c += 32) {
      const float grad_n = grad_normalised(c, n, grad_u);
      grad_x[int64_t{row} * layout.channels + c] =
          from_float<T>(rstd * multiply_add(-n, projection, grad_n - weighted_sum));
    }
  }
}

}  // namespace

void norm_act_forward_any(const NormActForward& params, int64_t most_blocks, Stream stream) {
  const NormActLayout& layout = params.layout;
  float* stats = params.stats.data == nullptr ? nullptr : params.stats.data_as<float>();
  dispatch_floating_cuda("norm_act", "x", params.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    VTOK_LAUNCH((norm_act_forward_any_kernel<T>),
                dim3(num_blocks(layout.rows.num_rows, kAnyWarps, most_blocks)), dim3(kAnyThreads),
                0, stream, kernel_layout(layout), params.x.data_as<T>(), any_array(params.weight),
                any_array(params.bias), any_array(params.y), stats);
  });
}

int64_t norm_act_backward_any(const NormActBackward& params, float* partials, int64_t most_blocks,
                              Stream stream) {
  const NormActLayout& layout = params.layout;
  const unsigned blocks = num_blocks(layout.rows.num_rows, kAnyWarps, most_blocks);
  dispatch_floating_cuda("norm_act", "x", params.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* grad_x = params.grad_x.data == nullptr ? nullptr : params.grad_x.data_as<T>();
    VTOK_LAUNCH((norm_act_backward_any_kernel<T>), dim3(blocks), dim3(kAnyThreads), 0, stream,
                kernel_layout(layout), any_array(params.grad_y), params.x.data_as<T>(),
                any_array(params.weight), any_array(params.bias), grad_x, partials);
  });
  return int64_t{blocks} * kAnyWarps;
}

}  // namespace vtok
