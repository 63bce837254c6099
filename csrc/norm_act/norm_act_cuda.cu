// LayerNorm and RMS norm on CUDA. Memory bound: x is read once (with grad_y, backwards), y written
// once, in 16-byte accesses. The backward pass finds the statistics again, from registers.
//
//   vectors   kLanes lanes own a row and keep it in registers, kVectors vectors each; rows of up to
//             512 channels. Blocks stay and take rows in turn, so that weight and bias are read,
//             and their gradients flushed, once per block; see Note [One wave of blocks].
//   any       (norm_act_cuda_any.cu) other channel counts and alignments.
//
// Weight gradients: sums over the rows of a block (or warp), then over blocks in their order.
#include "norm_act_device.cuh"

namespace vtok {
namespace {

constexpr int kMaxVectorChannels = 512;
constexpr int kMostBackwardBlocks = 4;  // per multiprocessor, of any kernel: sizes the workspace
constexpr int kAnyForwardBlocks = 8;    // per multiprocessor
constexpr int kSumSlices = 32;

// The part of a row that one lane holds. Vectors beyond the last channel hold zeros.
//
// Note [One wave of blocks]
// A bfloat16 element moves 4 bytes forwards and 6 backwards; a Hopper GPU has 28 and 42
// instructions to issue in the time that its memory takes for them. The kernels need about 20 and
// 33, so that instructions matter as much as bytes. Two vectors per lane where a row has them halve
// the shuffles per element. The grid is as many blocks as the launch bounds keep resident (their
// registers hold weight, bias and the sums of their gradients): one more would run alone after all
// others.
template <typename T, int kLanes, int kVectors>
struct RowPart {
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kRowsPerBlock = kThreads / kLanes;
  static constexpr int kForwardBlocks = kVectors * kWidth > 8 ? 3 : 5;  // per multiprocessor
  static constexpr int kBackwardBlocks = kVectors * kWidth > 8 ? 2 : 3;
  static_assert(kBackwardBlocks <= kMostBackwardBlocks, "the workspace has room for every block");

  // Vectors of a row as they lie in memory, zeros where there is none. Loads alone: what follows
  // need not wait for them before it loads as well.
  template <typename U>
  struct Words {
    static constexpr int kPerWord = kWidth * sizeof(U) > 16 ? 16 / sizeof(U) : kWidth;
    static constexpr int kWords = kWidth / kPerWord;
    VectorBits<Vector<U, kPerWord>> bits[kVectors][kWords];

    __device__ __forceinline__ void load(const U* row, int channels) {
      for_each(channels, [&](int v, int channel) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) bits[v][w].load(row + channel + w * kPerWord);
      });
    }
  };

  float values[kVectors][kWidth];

  __device__ __forceinline__ static int channel(int vector) {
    return (vector * kLanes + static_cast<int>(threadIdx.x % kLanes)) * kWidth;
  }

  // Calls function(vector, channel) for the vectors that exist.
  template <typename Function>
  __device__ __forceinline__ static void for_each(int channels, const Function& function) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (channel(v) < channels) function(v, channel(v));
    }
  }

  // Calls function(vector, i) for every place of a value.
  template <typename Function>
  __device__ __forceinline__ static void for_each_value(const Function& function) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) function(v, i);
    }
  }

  __device__ __forceinline__ void fill(float value) {
    for_each_value([&](int v, int i) { values[v][i] = value; });
  }

  // Zeros from `channels` on. Rows of 64, 128, 256 and 512 channels skip it with one branch.
  __device__ __forceinline__ void clear_absent(int channels) {
    if (channels == kLanes * kVectors * kWidth) return;
    for_each_value([&](int v, int i) {
      if (channel(v) >= channels) values[v][i] = 0.0f;
    });
  }

  template <typename U>
  __device__ __forceinline__ void convert(const Words<U>& words) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int w = 0; w < Words<U>::kWords; ++w) {
        float part[Words<U>::kPerWord];
        vector_to_floats(words.bits[v][w].vector(), part);
#pragma unroll
        for (int i = 0; i < Words<U>::kPerWord; ++i) {
          values[v][w * Words<U>::kPerWord + i] = part[i];
        }
      }
    }
  }

  // Replaces x by (x - mean) * rstd. The error of rsqrtf is 2 ulp.
  __device__ __forceinline__ void normalise(const KernelLayout& layout, float& mean, float& rstd) {
    mean = 0.0f;
    if (layout.subtract_mean) {
      float sum = 0.0f;
      for_each_value([&](int v, int i) { sum += values[v][i]; });
      mean = sum_over_lanes<kLanes>(sum) * layout.share;
    }
    for_each_value([&](int v, int i) { values[v][i] -= mean; });
    clear_absent(layout.channels);
    float squares = 0.0f;
    for_each_value(
        [&](int v, int i) { squares = multiply_add(values[v][i], values[v][i], squares); });
    rstd = rsqrtf(sum_over_lanes<kLanes>(squares) * layout.share + layout.eps);
    for_each_value([&](int v, int i) { values[v][i] *= rstd; });
  }
};

// weight or bias for the channels of this lane; `otherwise` if absent.
template <typename Part>
__device__ __forceinline__ void load_parameter(const KernelLayout& layout, const AnyArray& array,
                                               float otherwise, Part& part) {
  part.fill(otherwise);
  if (array.data == nullptr) return;
  with_data(array, [&](const auto* data) {
    Part::for_each(layout.channels,
                   [&](int v, int channel) { load_single_floats(data, channel, part.values[v]); });
  });
}

// y and its copies in front of frame 0.
template <typename Part>
__device__ __forceinline__ void store_row(const KernelLayout& layout, const AnyArray& y,
                                          const RowOffsets& at, const Part& part) {
  int64_t offset = at.y;
#pragma unroll 1
  for (int more = at.is_first_frame ? layout.front_copies : 0; more >= 0; --more) {
    with_data(y, [&](auto* data) {
      Part::for_each(layout.channels, [&](int v, int channel) {
        store_floats(data, offset + channel, part.values[v]);
      });
    });
    offset -= layout.frame_stride;
  }
}

// The gradient of y plus those of its copies; zeros for a row that does not exist.
template <typename Part>
__device__ __forceinline__ void load_row_gradient(const KernelLayout& layout,
                                                  const AnyArray& grad_y, const RowOffsets& at,
                                                  bool exists, Part& gradient) {
  const int channels = exists ? layout.channels : 0;
  with_data(grad_y, [&](auto* data) {
    typename Part::template Words<std::remove_pointer_t<decltype(data)>> words;
    words.load(data + at.y, channels);
    gradient.convert(words);
  });
  int64_t offset = at.y;
#pragma unroll 1
  for (int more = at.is_first_frame ? layout.front_copies : 0; more > 0; --more) {
    offset -= layout.frame_stride;
    Part::for_each(channels, [&](int v, int channel) {
      float copy[Part::kWidth];
      load_floats(grad_y, offset + channel, copy);
#pragma unroll
      for (int i = 0; i < Part::kWidth; ++i) gradient.values[v][i] += copy[i];
    });
  }
}

template <typename T, int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads, RowPart<T, kLanes, kVectors>::kForwardBlocks)
    norm_act_forward_kernel(const KernelLayout layout,
                            const T* __restrict__ x,  // [rows, C]
                            const AnyArray weight,    // [C]
                            const AnyArray bias,      // [C]
                            const AnyArray y,         // [rows, C]
                            float* stats) {           // [rows, 2] or null
  using Part = RowPart<T, kLanes, kVectors>;
  Part factors, summands;
  load_parameter(layout, weight, 1.0f, factors);
  load_parameter(layout, bias, 0.0f, summands);
  const uint32_t num_rows = static_cast<uint32_t>(layout.rows.num_rows);
  const uint32_t step = gridDim.x * Part::kRowsPerBlock;
  // All lanes of a warp take every turn: the shuffles need them.
  for (uint32_t first = blockIdx.x * Part::kRowsPerBlock; first < num_rows; first += step) {
    const uint32_t row = first + threadIdx.x / kLanes;
    const bool exists = row < num_rows;
    const RowOffsets at = row_offsets(layout.rows, exists ? row : num_rows - 1);
    typename Part::template Words<T> words;
    words.load(x + at.x, layout.channels);
    Part part;
    part.convert(words);
    float mean, rstd;
    part.normalise(layout, mean, rstd);
    if (!exists) continue;
    if (stats != nullptr && threadIdx.x % kLanes == 0) store_statistics(stats, row, mean, rstd);
    Part::for_each_value([&](int v, int i) {
      part.values[v][i] =
          multiply_add(part.values[v][i], factors.values[v][i], summands.values[v][i]);
    });
    if (layout.act) {
      Part::for_each_value([&](int v, int i) { part.values[v][i] = silu(part.values[v][i]); });
    }
    store_row(layout, y, at, part);
  }
}

// Adds the sums of all row groups of the block, in the order of warps, and writes them to
// `partials` [2, C] of this block.
template <typename Part, int kLanes>
__device__ __forceinline__ void flush_sums(const KernelLayout& layout, Part& weight_sums,
                                           Part& bias_sums, float* totals, float* partials) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int e = threadIdx.x; e < 2 * layout.channels; e += kThreads) totals[e] = 0.0f;
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) {
    for (auto* sums : {&weight_sums, &bias_sums}) {
#pragma unroll
      for (auto& vector : sums->values) {
#pragma unroll
        for (float& value : vector) value += __shfl_xor_sync(kFullWarp, value, distance);
      }
    }
  }
  __syncthreads();
  for (int turn = 0; turn < kThreads / 32; ++turn) {
    if (warp == turn && lane < kLanes) {
      Part::for_each(layout.channels, [&](int v, int channel) {
#pragma unroll
        for (int i = 0; i < Part::kWidth; ++i) {
          totals[channel + i] += weight_sums.values[v][i];
          totals[layout.channels + channel + i] += bias_sums.values[v][i];
        }
      });
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < 2 * layout.channels; e += kThreads) partials[e] = totals[e];
}

// From normalised values and the gradient of y: the gradient of the normalised values in its place,
// this lane's sums of it and of its product with them, and the sums over rows for weight and bias.
template <bool kAct, typename Part>
__device__ __forceinline__ void grad_normalised(const Part& normalised, const Part& factors,
                                                const Part& summands, Part& gradient,
                                                Part& weight_sums, Part& bias_sums,
                                                float& weighted_sum, float& projection) {
  weighted_sum = projection = 0.0f;
  Part::for_each_value([&](int v, int i) {
    const float n = normalised.values[v][i];
    const float u = multiply_add(n, factors.values[v][i], summands.values[v][i]);
    const float grad_u = grad_preactivation(kAct, u, gradient.values[v][i]);
    weight_sums.values[v][i] = multiply_add(grad_u, n, weight_sums.values[v][i]);
    bias_sums.values[v][i] += grad_u;
    const float grad_n = grad_u * factors.values[v][i];
    weighted_sum += grad_n;
    projection = multiply_add(grad_n, n, projection);
    gradient.values[v][i] = grad_n;
  });
}

template <typename T, int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads, RowPart<T, kLanes, kVectors>::kBackwardBlocks)
    norm_act_backward_kernel(const KernelLayout layout,
                             const AnyArray grad_y,    // [rows, C]
                             const T* __restrict__ x,  // [rows, C]
                             const AnyArray weight,    // [C]
                             const AnyArray bias,      // [C]
                             T* __restrict__ grad_x,   // [rows, C] or null
                             float* partials) {        // [blocks, 2, C] or null
  using Part = RowPart<T, kLanes, kVectors>;
  VTOK_SHARED(float, totals, 2 * kMaxVectorChannels);
  Part factors, summands, weight_sums, bias_sums;
  load_parameter(layout, weight, 1.0f, factors);
  load_parameter(layout, bias, 0.0f, summands);
  weight_sums.fill(0.0f);
  bias_sums.fill(0.0f);
  const uint32_t num_rows = static_cast<uint32_t>(layout.rows.num_rows);
  const uint32_t step = gridDim.x * Part::kRowsPerBlock;
  for (uint32_t first = blockIdx.x * Part::kRowsPerBlock; first < num_rows; first += step) {
    const uint32_t row = first + threadIdx.x / kLanes;
    const bool exists = row < num_rows;
    const RowOffsets at = row_offsets(layout.rows, exists ? row : num_rows - 1);
    typename Part::template Words<T> words;
    words.load(x + at.x, layout.channels);
    Part part, gradient;
    load_row_gradient(layout, grad_y, at, exists, gradient);
    part.convert(words);
    float mean, rstd;
    part.normalise(layout, mean, rstd);
    float weighted_sum, projection;
    if (layout.act) {
      grad_normalised<true>(part, factors, summands, gradient, weight_sums, bias_sums, weighted_sum,
                            projection);
    } else {
      grad_normalised<false>(part, factors, summands, gradient, weight_sums, bias_sums,
                             weighted_sum, projection);
    }
    projection = sum_over_lanes<kLanes>(projection) * layout.share;
    weighted_sum = sum_over_lanes<kLanes>(weighted_sum) * layout.share;
    const float weighted_mean = layout.subtract_mean ? weighted_sum : 0.0f;
    if (!exists || grad_x == nullptr) continue;
    // rstd * (grad_n - weighted_mean - n * projection)
    const float summand = -rstd * weighted_mean, factor = -rstd * projection;
    Part::for_each_value([&](int v, int i) {
      gradient.values[v][i] = multiply_add(part.values[v][i], factor,
                                           multiply_add(gradient.values[v][i], rstd, summand));
    });
    Part::for_each(layout.channels, [&](int v, int channel) {
      store_floats(grad_x, int64_t{row} * layout.channels + channel, gradient.values[v]);
    });
  }
  if (partials != nullptr) {
    flush_sums<Part, kLanes>(layout, weight_sums, bias_sums, totals,
                             partials + int64_t{blockIdx.x} * 2 * layout.channels);
  }
}

__global__ void __launch_bounds__(32 * kSumSlices)
    norm_act_sum_partials_kernel(int64_t num_parts, int channels,
                                 const float* __restrict__ partials,  // [parts, 2, C]
                                 const AnyArray grad_weight,          // [C] or null
                                 const AnyArray grad_bias) {          // [C] or null
  VTOK_SHARED(float, totals, kSumSlices * 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, slice = static_cast<int>(threadIdx.x) / 32;
  const int entry = static_cast<int>(blockIdx.x) * 32 + lane;
  float total = 0.0f;
  if (entry < 2 * channels) {
    for (int64_t part = slice; part < num_parts; part += kSumSlices) {
      total += partials[part * 2 * channels + entry];
    }
  }
  totals[slice * 32 + lane] = total;
  __syncthreads();
  if (slice > 0 || entry >= 2 * channels) return;
  float sum[1] = {0.0f};
  for (int s = 0; s < kSumSlices; ++s) sum[0] += totals[s * 32 + lane];
  const bool is_weight = entry < channels;
  const AnyArray& target = is_weight ? grad_weight : grad_bias;
  if (target.data != nullptr) store_floats(target, is_weight ? entry : entry - channels, sum);
}

// Calls function(lanes, vectors), two integral constants, for rows of `num_vectors` vectors of T.
template <typename T, typename Function>
void dispatch_row_shape(int64_t num_vectors, const Function& function) {
  using std::integral_constant;
  if (num_vectors <= 8) return function(integral_constant<int, 8>{}, integral_constant<int, 1>{});
  if (num_vectors <= 16) return function(integral_constant<int, 8>{}, integral_constant<int, 2>{});
  if (num_vectors <= 32) return function(integral_constant<int, 16>{}, integral_constant<int, 2>{});
  if constexpr (sizeof(T) == 4) {
    if (num_vectors > 64)
      return function(integral_constant<int, 32>{}, integral_constant<int, 4>{});
  }
  static_assert(sizeof(T) == 4 || kMaxVectorChannels * sizeof(T) <= 64 * 16);
  function(integral_constant<int, 32>{}, integral_constant<int, 2>{});
}

bool takes_vectors(const NormActLayout& layout, int width) {
  return layout.channels <= kMaxVectorChannels && has_vector_rows(layout, width);
}

}  // namespace

void launch_sum_partials(const NormActBackward& params, const float* partials, int64_t num_parts,
                         Stream stream) {
  const int channels = static_cast<int>(params.layout.channels);
  const unsigned blocks = static_cast<unsigned>((2 * channels + 31) / 32);
  VTOK_LAUNCH(norm_act_sum_partials_kernel, dim3(blocks), dim3(32 * kSumSlices), 0, stream,
              num_parts, channels, partials, any_array(params.grad_weight),
              any_array(params.grad_bias));
}

static void forward_rows(const NormActForward& params, Stream stream) {
  const NormActLayout& layout = params.layout;
  const KernelLayout kernel = kernel_layout(layout);
  const AnyArray weight = any_array(params.weight), bias = any_array(params.bias);
  const AnyArray y = any_array(params.y);
  float* stats = params.stats.data == nullptr ? nullptr : params.stats.data_as<float>();
  const int64_t multiprocessors = num_multiprocessors(params.x.device_index);
  dispatch_floating_cuda("norm_act", "x", params.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    const T* x = params.x.data_as<T>();
    if (!takes_vectors(layout, kWidth) || !is_aligned(params.x, kWidth) ||
        !is_aligned(params.y, kWidth)) {
      norm_act_forward_any(params, kAnyForwardBlocks * multiprocessors, stream);
      return;
    }
    dispatch_row_shape<T>(layout.channels / kWidth, [&](auto lanes, auto vectors) {
      constexpr int kLanes = decltype(lanes)::value, kVectors = decltype(vectors)::value;
      using Part = RowPart<T, kLanes, kVectors>;
      const unsigned blocks = num_blocks(layout.rows.num_rows, Part::kRowsPerBlock,
                                         Part::kForwardBlocks * multiprocessors);
      VTOK_LAUNCH((norm_act_forward_kernel<T, kLanes, kVectors>), dim3(blocks), dim3(kThreads), 0,
                  stream, kernel, x, weight, bias, y, stats);
    });
  });
}

static void backward_rows(const NormActBackward& params, Stream stream) {
  const NormActLayout& layout = params.layout;
  const KernelLayout kernel = kernel_layout(layout);
  const AnyArray weight = any_array(params.weight), bias = any_array(params.bias);
  const AnyArray grad_y = any_array(params.grad_y);
  const int64_t multiprocessors = num_multiprocessors(params.x.device_index);
  const bool needs_sums = params.grad_weight.data != nullptr || params.grad_bias.data != nullptr;
  float* partials = needs_sums ? params.workspace.data_as<float>() : nullptr;
  int64_t num_parts = 0;
  dispatch_floating_cuda("norm_act", "x", params.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    const T* x = params.x.data_as<T>();
    T* grad_x = params.grad_x.data == nullptr ? nullptr : params.grad_x.data_as<T>();
    if (!takes_vectors(layout, kWidth) || !is_aligned(params.x, kWidth) ||
        !is_aligned(params.grad_y, kWidth) || !is_aligned(params.grad_x, kWidth)) {
      num_parts = norm_act_backward_any(params, partials, multiprocessors, stream);
      return;
    }
    dispatch_row_shape<T>(layout.channels / kWidth, [&](auto lanes, auto vectors) {
      constexpr int kLanes = decltype(lanes)::value, kVectors = decltype(vectors)::value;
      using Part = RowPart<T, kLanes, kVectors>;
      const unsigned blocks = num_blocks(layout.rows.num_rows, Part::kRowsPerBlock,
                                         Part::kBackwardBlocks * multiprocessors);
      num_parts = blocks;
      VTOK_LAUNCH((norm_act_backward_kernel<T, kLanes, kVectors>), dim3(blocks), dim3(kThreads), 0,
                  stream, kernel, grad_y, x, weight, bias, grad_x, partials);
    });
  });
  if (needs_sums) launch_sum_partials(params, partials, num_parts, stream);
}

void norm_act_forward_cuda(const NormActForward& params, Stream stream) {
  const DeviceGuard device(params.x.device_index);
  launch_fill_surroundings(params, stream);
  if (params.layout.rows.num_rows == 0) return;
  is_grouped(params.layout.kind) ? norm_act_forward_groups(params, stream)
                                 : forward_rows(params, stream);
}

void norm_act_backward_cuda(const NormActBackward& params, Stream stream) {
  const DeviceGuard device(params.x.device_index);
  is_grouped(params.layout.kind) ? norm_act_backward_groups(params, stream)
                                 : backward_rows(params, stream);
}

int64_t norm_act_workspace_cuda(const NormActLayout& layout, bool backward, int device_index) {
  if (is_grouped(layout.kind)) return norm_act_workspace_groups(layout, backward);
  static_assert(kMostBackwardBlocks == kAnyWarps, "both kernels have as many parts");
  return backward ? int64_t{kAnyWarps} * num_multiprocessors(device_index) * 2 * layout.channels
                  : 0;
}

}  // namespace vtok
