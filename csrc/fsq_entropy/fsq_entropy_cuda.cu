// FSQ entropy on CUDA: factors and their backward, and the entropy of the average.
//
// A warp owns a token: softmax over the levels in shared memory, then one coalesced write of the
// two factors (forward) or one read of their gradients (backward). Expected to be bound by the
// memory traffic of the factors, (K1 + K2) * 4 bytes per token, which a chunk keeps in the L2
// cache for the GEMM. No atomics: every sum has a fixed order.
#include "../core/dispatch.h"
#include "fsq_entropy.h"
#include "fsq_entropy_warp.cuh"

namespace vtok {
namespace {

using namespace fsq_entropy_cuda;

// Writes the products of channels [first, last) for all combinations. kWidth consecutive
// combinations differ in the first channel only.
template <int kWidth>
__device__ __forceinline__ void write_half(const FsqEntropyLayout& layout, int first, int last,
                                           int size, const float* weight,
                                           float* __restrict__ out) {  // [size]
  const int lane = threadIdx.x % 32;
  for (int i = lane * kWidth; i < size; i += 32 * kWidth) {
    int rest = i;
    Vector<float, kWidth> products;
    for (int e = 0; e < kWidth; ++e) products.values[e] = 1.0f;
    for (int d = first; d < last; ++d) {
      const float* channel = weight + layout.level_offset[d] + take_level(layout, d, rest);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) products.values[e] *= channel[d == first ? e : 0];
    }
    store_vector(out + i, products);
  }
}

template <typename T, int kLowWidth, int kHighWidth>
__global__ void __launch_bounds__(kThreads)
    fsq_entropy_factors_kernel(const FsqEntropyLayout layout, const int width,
                               const T* __restrict__ z, const FsqEntropyStrides z_strides,
                               float* __restrict__ low,  // [codebooks, tokens, K1]
                               const FsqEntropyStrides low_strides,
                               float* __restrict__ high,  // [codebooks, tokens, K2]
                               const FsqEntropyStrides high_strides,
                               float* __restrict__ entropy,  // [codebooks, tokens] or null
                               const FsqEntropyStrides entropy_strides,
                               float* __restrict__ commitment,  // [codebooks, tokens] or null
                               const FsqEntropyStrides commitment_strides,
                               int32_t* __restrict__ indices,  // [codebooks, tokens] or null
                               const FsqEntropyStrides index_strides) {
  VTOK_DYNAMIC_SHARED(float, tables);  // [kWarps, level_sum]
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= layout.num_codebooks * layout.num_tokens) return;  // whole warps
  const int64_t codebook = row / layout.num_tokens, token = row % layout.num_tokens;
  float* weight = tables + threadIdx.x / 32 * layout.level_sum;
  float token_entropy = 0.0f, squares = 0.0f;
  int32_t index = 0;
  assign(layout, width, z + codebook * z_strides.codebook + token * z_strides.token,
         z_strides.channel, weight, nullptr, [&](int d, const ChannelMoments& m) {
           token_entropy += m.entropy;
           if (indices == nullptr && commitment == nullptr) return;
           const FsqEntropyNearest<float> nearest = fsq_entropy_nearest(m.value, layout.channel[d]);
           squares += nearest.error * nearest.error;
           index += nearest.level * static_cast<int32_t>(layout.channel[d].basis);
         });
  write_half<kLowWidth>(layout, 0, layout.num_low, layout.low_size, weight,
                        low + codebook * low_strides.codebook + token * low_strides.token);
  write_half<kHighWidth>(layout, layout.num_low, layout.channels, layout.high_size, weight,
                         high + codebook * high_strides.codebook + token * high_strides.token);
  token_entropy = group_sum(token_entropy, 32);
  squares = group_sum(squares, 32);
  index = group_sum(index, 32);
  if (threadIdx.x % 32 != 0) return;
  const auto at = [&](const FsqEntropyStrides& s) {
    return codebook * s.codebook + token * s.token;
  };
  if (entropy != nullptr) entropy[at(entropy_strides)] = token_entropy;
  if (commitment != nullptr) commitment[at(commitment_strides)] = squares;
  if (indices != nullptr) indices[at(index_strides)] = squares == squares ? index : -1;
}

// A half's share in its channels: sum over combinations of probability * gradient * (level -
// mean). A lane folds the first channel alone, so that the levels of the others are found once for
// all of its levels. The sum of channel d ends up in lane d.
template <int kWidth>
__device__ __forceinline__ float fold_half(const FsqEntropyLayout& layout, int first, int last,
                                           int size, const float* weight, const float* from_mean,
                                           const float* __restrict__ grad) {  // [size]
  const int lane = threadIdx.x % 32;
  const int levels = layout.channel[first].levels;
  const int num_rows = size / levels;
  const float* p0 = weight + layout.level_offset[first];
  const float* distance0 = from_mean + layout.level_offset[first];
  float result = 0.0f;
  for (int begin = 0; begin < num_rows; begin += 32) {
    const int row = begin + lane;
    float sum = 0.0f, moment = 0.0f, product = 1.0f;
    if (row < num_rows) {
      for (int level = 0; level < levels; level += kWidth) {
        const auto values = load_vector<Vector<float, kWidth>>(grad + row * levels + level);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float term = p0[level + e] * values.values[e];
          sum += term;
          moment += distance0[level + e] * term;
        }
      }
      int rest = row;
      for (int d = first + 1; d < last; ++d) {
        product *= weight[layout.level_offset[d] + take_level(layout, d, rest)];
      }
    }
    const float share = group_sum(product * moment, 32);
    if (lane == first) result += share;
    int rest = row < num_rows ? row : 0;
    for (int d = first + 1; d < last; ++d) {
      const float distance = from_mean[layout.level_offset[d] + take_level(layout, d, rest)];
      const float total = group_sum(product * sum * distance, 32);
      if (lane == d) result += total;
    }
  }
  return result;
}

template <typename T, int kLowWidth, int kHighWidth>
__global__ void __launch_bounds__(kThreads)
    fsq_entropy_backward_kernel(const FsqEntropyLayout layout, const int width,
                                const T* __restrict__ z, const FsqEntropyStrides z_strides,
                                const float* __restrict__ grad_low,  // [codebooks, tokens, K1]
                                const FsqEntropyStrides low_strides,
                                const float* __restrict__ grad_high,  // [codebooks, tokens, K2]
                                const FsqEntropyStrides high_strides,
                                const float* __restrict__ grad_entropy,     // [] or null
                                const float* __restrict__ grad_commitment,  // [] or null
                                T* __restrict__ grad_z,  // [codebooks, tokens, D]
                                const FsqEntropyStrides out_strides) {
  VTOK_DYNAMIC_SHARED(float, tables);                // [kWarps, 2, level_sum]
  VTOK_SHARED(float, own, kWarps* kFsqMaxChannels);  // d loss / dz but for the halves' shares
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= layout.num_codebooks * layout.num_tokens) return;  // whole warps
  const int64_t codebook = row / layout.num_tokens, token = row % layout.num_tokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* weight = tables + warp * 2 * layout.level_sum;
  float* from_mean = weight + layout.level_sum;
  assign(layout, width, z + codebook * z_strides.codebook + token * z_strides.token,
         z_strides.channel, weight, from_mean, [&](int d, const ChannelMoments& m) {
           float grad = 0.0f;
           if (grad_entropy != nullptr) {
             grad -=
                 *grad_entropy * (m.slope * m.variance) * static_cast<float>(layout.slope_per_z[d]);
           }
           if (grad_commitment != nullptr) {
             grad += *grad_commitment * (2 * fsq_entropy_nearest(m.value, layout.channel[d]).error);
           }
           own[warp * kFsqMaxChannels + d] = grad;
         });
  float share = 0.0f;
  if (grad_low != nullptr) {
    share = fold_half<kLowWidth>(
        layout, 0, layout.num_low, layout.low_size, weight, from_mean,
        grad_low + codebook * low_strides.codebook + token * low_strides.token);
    if (layout.num_low < layout.channels) {
      share += fold_half<kHighWidth>(
          layout, layout.num_low, layout.channels, layout.high_size, weight, from_mean,
          grad_high + codebook * high_strides.codebook + token * high_strides.token);
    }
  }
  if (lane >= layout.channels) return;
  const float grad =
      own[warp * kFsqMaxChannels + lane] + static_cast<float>(layout.slope_per_z[lane]) * share;
  grad_z[codebook * out_strides.codebook + token * out_strides.token + lane * out_strides.channel] =
      from_float<T>(grad);
}

constexpr int kAverageWidth = 4;  // codes of a thread, one 16-byte access
static_assert(kThreads * kAverageWidth == kFsqEntropyPartial, "a block computes one partial sum");

// Codes [first, first + kAverageWidth) of `average`, 0 beyond its end.
__device__ __forceinline__ Vector<float, kAverageWidth> load_codes(const float* average,
                                                                   int64_t first, int64_t size) {
  if (first + kAverageWidth <= size) {
    return load_vector<Vector<float, kAverageWidth>>(average + first);
  }
  Vector<float, kAverageWidth> values{};
  for (int e = 0; first + e < size; ++e) values.values[e] = average[first + e];
  return values;
}

__global__ void __launch_bounds__(kThreads)
    fsq_entropy_average_forward_kernel(const float* __restrict__ average,  // [K]
                                       const int64_t size,
                                       float* __restrict__ partial) {  // [blocks]
  VTOK_SHARED(float, scratch, kWarps);
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kAverageWidth;
  const auto p = load_codes(average, first, size);
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kAverageWidth; ++e) sum += fsq_entropy_term(p.values[e]);  // 0 for p = 0
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    fsq_entropy_average_backward_kernel(const float* __restrict__ average,  // [K]
                                        const int64_t size,
                                        const float* __restrict__ grad_entropy,  // []
                                        float* __restrict__ grad_average) {      // [K]
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kAverageWidth;
  auto values = load_codes(average, first, size);
  const float grad = *grad_entropy;
#pragma unroll
  for (int e = 0; e < kAverageWidth; ++e) {
    values.values[e] = grad * fsq_entropy_term_slope(values.values[e]);
  }
  if (first + kAverageWidth <= size) {
    store_vector(grad_average + first, values);
  } else {
    for (int e = 0; first + e < size; ++e) grad_average[first + e] = values.values[e];
  }
}

// Whether 16-byte accesses work on the rows of `view`, four levels of a half's first channel each.
bool is_wide(const TensorView& view, int levels) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.strides[0] % 4 == 0 &&
         view.strides[1] % 4 == 0 && levels % 4 == 0;
}

// Calls function(low width, high width) with 4 where rows allow wide accesses, else 1.
template <typename Function>
void dispatch_width(const FsqEntropyLayout& layout, const TensorView& low, const TensorView& high,
                    const Function& function) {
  using One = std::integral_constant<int, 1>;
  using Four = std::integral_constant<int, 4>;
  const bool has_high = layout.num_low < layout.channels;
  const bool low_wide = is_wide(low, layout.channel[0].levels);
  const bool high_wide = has_high && is_wide(high, layout.channel[layout.num_low].levels);
  if (low_wide && high_wide) return function(Four{}, Four{});
  if (low_wide) return function(Four{}, One{});
  if (high_wide) return function(One{}, Four{});
  function(One{}, One{});
}

float* optional_floats(const OutputView& view) {
  return view.data ? view.data_as<float>() : nullptr;
}

const float* optional_floats(const TensorView& view) {
  return view.data ? view.data_as<float>() : nullptr;
}

}  // namespace

void fsq_entropy_factors_cuda(const FsqEntropyFactors& params, Stream stream) {
  const DeviceGuard device(params.z.device_index);
  const FsqEntropyLayout& layout = params.layout;
  const unsigned blocks = blocks_for(layout.num_codebooks * layout.num_tokens, kWarps);
  const size_t shared_bytes = kWarps * layout.level_sum * sizeof(float);
  dispatch_z(params.z, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(layout, params.low, params.high, [&](auto low_width, auto high_width) {
      VTOK_LAUNCH((fsq_entropy_factors_kernel<T, low_width.value, high_width.value>), dim3(blocks),
                  dim3(kThreads), shared_bytes, stream, layout, lanes_per_channel(layout),
                  params.z.data_as<T>(), fsq_entropy_strides(params.z), params.low.data_as<float>(),
                  fsq_entropy_strides(params.low), params.high.data_as<float>(),
                  fsq_entropy_strides(params.high), optional_floats(params.entropy),
                  fsq_entropy_strides(params.entropy), optional_floats(params.commitment),
                  fsq_entropy_strides(params.commitment),
                  params.indices.data ? params.indices.data_as<int32_t>() : nullptr,
                  fsq_entropy_strides(params.indices));
    });
  });
}

void fsq_entropy_backward_cuda(const FsqEntropyBackward& params, Stream stream) {
  const DeviceGuard device(params.z.device_index);
  const FsqEntropyLayout& layout = params.layout;
  const unsigned blocks = blocks_for(layout.num_codebooks * layout.num_tokens, kWarps);
  const size_t shared_bytes = 2 * kWarps * layout.level_sum * sizeof(float);
  dispatch_z(params.z, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(layout, params.grad_low, params.grad_high, [&](auto low_width, auto high_width) {
      VTOK_LAUNCH((fsq_entropy_backward_kernel<T, low_width.value, high_width.value>), dim3(blocks),
                  dim3(kThreads), shared_bytes, stream, layout, lanes_per_channel(layout),
                  params.z.data_as<T>(), fsq_entropy_strides(params.z),
                  optional_floats(params.grad_low), fsq_entropy_strides(params.grad_low),
                  optional_floats(params.grad_high), fsq_entropy_strides(params.grad_high),
                  optional_floats(params.grad_entropy), optional_floats(params.grad_commitment),
                  params.grad_z.data_as<T>(), fsq_entropy_strides(params.grad_z));
    });
  });
}

void fsq_entropy_average_forward_cuda(const FsqEntropyAverageForward& params, Stream stream) {
  const DeviceGuard device(params.average.device_index);
  const int64_t size = params.average.num_elements();
  VTOK_LAUNCH(fsq_entropy_average_forward_kernel, dim3(blocks_for(size, kFsqEntropyPartial)),
              dim3(kThreads), 0, stream, params.average.data_as<float>(), size,
              params.partial_entropy.data_as<float>());
}

void fsq_entropy_average_backward_cuda(const FsqEntropyAverageBackward& params, Stream stream) {
  const DeviceGuard device(params.average.device_index);
  const int64_t size = params.average.num_elements();
  VTOK_LAUNCH(fsq_entropy_average_backward_kernel, dim3(blocks_for(size, kFsqEntropyPartial)),
              dim3(kThreads), 0, stream, params.average.data_as<float>(), size,
              params.grad_entropy.data_as<float>(), params.grad_average.data_as<float>());
}

}  // namespace vtok
