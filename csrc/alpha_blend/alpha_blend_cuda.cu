// alpha_blend on CUDA. Memory bound: forward reads a and b and writes out, backward reads the
// gradient, a and b and writes both gradients, each element once and in 16-byte accesses where the
// layout allows. With a single factor a dense call is one run, so that no thread divides; with
// per-channel or per-frame factors a vector costs one or two 32-bit divisions, which is far below
// what the memory time of 48 to 80 bytes allows.
//
// The gradient of the factor: every block sums its piece of a group (Note [Groups, rows, runs]) in
// a fixed order, and a second kernel of one warp per factor adds the blocks' sums in a fixed order:
// bitwise repeatable, no atomics.
#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "alpha_blend.h"
#include "alpha_blend_math.h"

namespace vtok {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 0x7fffffff;

// Loads kWidth neighbours, or one value.
template <typename T, int kWidth>
using Values = Vector<T, kWidth>;

// alpha of kWidth positions of a run: one value, or one per position.
template <int kWidth>
struct Alphas {
  float values[kWidth];

  __device__ __forceinline__ Alphas(const BlendLayout& layout, const float* factor,
                                    int64_t offset) {
    if (layout.run_has_factors) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[i] =
            blend_alpha(factor[offset + i * layout.run.strides[kBlendFactor]], layout.is_logit);
      }
    } else {
      const float alpha = blend_alpha(factor[offset], layout.is_logit);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = alpha;
    }
  }
};

// Offsets of the vector at `column` (in elements) of a row.
VTOK_FUNCTION BlendOffsets vector_offsets(const BlendLayout& layout, int64_t group, int64_t row,
                                          int64_t column) {
  BlendOffsets offsets = row_offsets(layout, group, row);
  for (int tensor = 0; tensor < kNumBlendTensors; ++tensor) {
    offsets.of[tensor] += column * layout.run.strides[tensor];
  }
  return offsets;
}

struct Position {
  int64_t row, column;
};

// Row and column of vector `index` when the rows are laid end to end.
VTOK_FUNCTION Position position_of(int64_t index, int64_t vectors_per_run, int width) {
  if (index < vectors_per_run) return {0, index * width};
  if ((index | vectors_per_run) >> 32 == 0) {
    const uint32_t row = static_cast<uint32_t>(index) / static_cast<uint32_t>(vectors_per_run);
    return {row, (index - int64_t{row} * vectors_per_run) * width};
  }
  const int64_t row = index / vectors_per_run;
  return {row, (index - row * vectors_per_run) * width};
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    alpha_blend_forward_kernel(const BlendLayout layout,
                               const T* __restrict__ a,           // [groups, rows, run]
                               const T* __restrict__ b,           // [groups, rows, run]
                               const float* __restrict__ factor,  // [factors]
                               T* __restrict__ out) {             // [groups, rows, run]
  const int64_t vectors_per_run = layout.run.size / kWidth;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= layout.num_groups * layout.num_rows * vectors_per_run) return;
  const Position at = position_of(index, vectors_per_run, kWidth);
  const int64_t group = layout.num_groups == 1 ? 0 : at.row / layout.num_rows;
  const BlendOffsets offsets =
      vector_offsets(layout, group, at.row - group * layout.num_rows, at.column);
  const auto a_values = load_vector<Values<T, kWidth>>(a + offsets.of[kBlendA]);
  const auto b_values = load_vector<Values<T, kWidth>>(b + offsets.of[kBlendB]);
  const Alphas<kWidth> alpha(layout, factor, offsets.of[kBlendFactor]);
  Values<T, kWidth> result;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    result.values[i] = from_float<T>(
        blend_value(to_float(a_values.values[i]), to_float(b_values.values[i]), alpha.values[i]));
  }
  store_vector(out + offsets.of[kBlendOut], result);
}

// Pointers of a backward call; null where absent.
template <typename T>
struct BackwardPointers {
  const T* grad_out;    // [groups, rows, run]
  const T* a;           // [groups, rows, run]
  const T* b;           // [groups, rows, run]
  const float* factor;  // [factors]
  T* grad_a;            // [groups, rows, run]
  T* grad_b;            // [groups, rows, run]
};

// Writes the gradients of one vector and adds grad_out * (a - b) to `sums`.
template <typename T, int kWidth>
__device__ __forceinline__ void backward_vector(const BackwardPointers<T>& p,
                                                const BlendOffsets& at, const Alphas<kWidth>& alpha,
                                                float* sums) {
  const auto grad = load_vector<Values<T, kWidth>>(p.grad_out + at.of[kBlendOut]);
  if (p.a != nullptr) {
    const auto a = load_vector<Values<T, kWidth>>(p.a + at.of[kBlendA]);
    const auto b = load_vector<Values<T, kWidth>>(p.b + at.of[kBlendB]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sums[i] += to_float(grad.values[i]) * (to_float(a.values[i]) - to_float(b.values[i]));
    }
  }
  Values<T, kWidth> scaled;
  if (p.grad_a != nullptr) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      scaled.values[i] = from_float<T>(alpha.values[i] * to_float(grad.values[i]));
    }
    store_vector(p.grad_a + at.of[kBlendGradA], scaled);
  }
  if (p.grad_b != nullptr) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      scaled.values[i] = from_float<T>((1.0f - alpha.values[i]) * to_float(grad.values[i]));
    }
    store_vector(p.grad_b + at.of[kBlendGradB], scaled);
  }
}

// A group's factor is one value: block (group, piece) sums over rows and runs.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    alpha_blend_backward_kernel(const BlendLayout layout, const BackwardPointers<T> p,
                                float* __restrict__ partials) {  // [groups, blocks]
  VTOK_SHARED(float, warp_sums, kThreads / kWarp);
  const int64_t group = blockIdx.x / layout.num_blocks;
  const int64_t block = blockIdx.x - group * layout.num_blocks;
  const int64_t vectors_per_run = layout.run.size / kWidth;
  const int64_t count = layout.num_rows * vectors_per_run;
  const int64_t end = block_begin(count, layout.num_blocks, block + 1);
  float sums[kWidth] = {};
  const BlendOffsets start = vector_offsets(layout, group, 0, 0);
  const Alphas<kWidth> alpha(layout, p.factor, start.of[kBlendFactor]);
  for (int64_t index = block_begin(count, layout.num_blocks, block) + threadIdx.x; index < end;
       index += kThreads) {
    const Position at = position_of(index, vectors_per_run, kWidth);
    backward_vector<T, kWidth>(p, vector_offsets(layout, group, at.row, at.column), alpha, sums);
  }
  if (partials == nullptr) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += sums[i];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += warp_sums[warp];
  partials[blockIdx.x] = total;
}

// A run holds one factor per position: block (group, piece, slice of the run) keeps one sum per
// column. Threads are `columns` vectors wide and kThreads / columns rows high.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    alpha_blend_backward_columns_kernel(const BlendLayout layout, const BackwardPointers<T> p,
                                        int columns, int64_t num_slices,
                                        float* __restrict__ partials) {  // [groups, blocks, run]
  VTOK_SHARED(float, row_sums, kThreads* kWidth);                        // [rows, columns, kWidth]
  const int64_t slice = blockIdx.x % num_slices;
  const int64_t group_block = blockIdx.x / num_slices;
  const int64_t group = group_block / layout.num_blocks;
  const int64_t block = group_block - group * layout.num_blocks;
  const int rows = kThreads / columns;
  const int row = threadIdx.x / columns;
  const int64_t column = (slice * columns + threadIdx.x % columns) * kWidth;
  const bool is_active = row < rows && column < layout.run.size;
  float sums[kWidth] = {};
  if (is_active) {
    const int64_t end = block_begin(layout.num_rows, layout.num_blocks, block + 1);
    const BlendOffsets start = vector_offsets(layout, group, 0, column);
    const Alphas<kWidth> alpha(layout, p.factor, start.of[kBlendFactor]);
    for (int64_t r = block_begin(layout.num_rows, layout.num_blocks, block) + row; r < end;
         r += rows) {
      backward_vector<T, kWidth>(p, vector_offsets(layout, group, r, column), alpha, sums);
    }
  }
  if (partials == nullptr) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) row_sums[threadIdx.x * kWidth + i] = sums[i];
  __syncthreads();
  if (!is_active || row != 0) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    float total = 0.0f;
    for (int r = 0; r < rows; ++r) total += row_sums[(r * columns + threadIdx.x) * kWidth + i];
    partials[group_block * layout.run.size + column + i] = total;
  }
}

// One warp per factor adds the partial sums of its blocks.
__global__ void __launch_bounds__(kThreads)
    alpha_blend_factor_kernel(const BlendLayout layout,
                              const float* __restrict__ partials,  // [groups, blocks, columns]
                              const float* __restrict__ factor,    // [factors]
                              float* __restrict__ grad_factor) {   // [factors]
  const int64_t columns = layout.run_has_factors ? layout.run.size : 1;
  const int64_t number = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (number >= layout.num_groups * columns) return;  // a whole warp leaves
  const int64_t group = number / columns;
  const int64_t column = number - group * columns;
  float sum = 0.0f;
  for (int64_t block = lane; block < layout.num_blocks; block += kWarp) {
    sum += partials[(group * layout.num_blocks + block) * columns + column];
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  if (lane != 0) return;
  const int64_t at = vector_offsets(layout, group, 0, column).of[kBlendFactor];
  grad_factor[at] = sum * blend_slope(factor[at], layout.is_logit);
}

bool is_aligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

// Whether `width` neighbours of a run are one aligned vector in tensor `number`, given as `view`.
bool is_vector(const BlendLayout& layout, const TensorView& view, int number, int width) {
  if (view.data == nullptr) return true;
  bool vector = is_aligned(view) && layout.run.strides[number] == 1;
  for (int dim = 0; dim < layout.num_group_dims; ++dim) {
    vector = vector && layout.group_dims[dim].strides[number] % width == 0;
  }
  for (int dim = 0; dim < layout.num_row_dims; ++dim) {
    vector = vector && layout.row_dims[dim].strides[number] % width == 0;
  }
  return vector;
}

unsigned grid_of(int64_t blocks) {
  VTOK_CHECK_VALUE(blocks <= kMaxBlocks, "alpha_blend: a has too many elements for one launch");
  return static_cast<unsigned>(blocks);
}

template <typename T, int kWidth>
void launch_forward(const BlendForward& params, Stream stream) {
  const BlendLayout& layout = params.layout;
  const int64_t vectors = layout.num_groups * layout.num_rows * (layout.run.size / kWidth);
  VTOK_LAUNCH((alpha_blend_forward_kernel<T, kWidth>),
              dim3(grid_of((vectors + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream, layout,
              params.a.data_as<T>(), params.b.data_as<T>(), params.factor.data_as<float>(),
              params.out.data_as<T>());
}

template <typename T, int kWidth>
void launch_backward(const BlendBackward& params, Stream stream) {
  const BlendLayout& layout = params.layout;
  const bool needs_sums = params.a.data != nullptr;
  const BackwardPointers<T> pointers{
      params.grad_out.data_as<T>(),
      needs_sums ? params.a.data_as<T>() : nullptr,
      needs_sums ? params.b.data_as<T>() : nullptr,
      params.factor.data_as<float>(),
      params.grad_a.data != nullptr ? params.grad_a.data_as<T>() : nullptr,
      params.grad_b.data != nullptr ? params.grad_b.data_as<T>() : nullptr};
  float* partials = needs_sums ? params.partials.data_as<float>() : nullptr;
  const int64_t blocks = layout.num_groups * layout.num_blocks;
  if (layout.run_has_factors) {
    const int64_t vectors = (layout.run.size + kWidth - 1) / kWidth;
    const int columns = static_cast<int>(vectors < kThreads ? vectors : kThreads);
    const int64_t num_slices = (vectors + columns - 1) / columns;
    VTOK_LAUNCH((alpha_blend_backward_columns_kernel<T, kWidth>),
                dim3(grid_of(blocks * num_slices)), dim3(kThreads), 0, stream, layout, pointers,
                columns, num_slices, partials);
  } else {
    VTOK_LAUNCH((alpha_blend_backward_kernel<T, kWidth>), dim3(grid_of(blocks)), dim3(kThreads), 0,
                stream, layout, pointers, partials);
  }
  if (!needs_sums) return;
  const int64_t factors = layout.num_groups * (layout.run_has_factors ? layout.run.size : 1);
  constexpr int64_t kFactorsPerBlock = kThreads / kWarp;
  VTOK_LAUNCH(alpha_blend_factor_kernel,
              dim3(grid_of((factors + kFactorsPerBlock - 1) / kFactorsPerBlock)), dim3(kThreads), 0,
              stream, layout, static_cast<const float*>(partials), params.factor.data_as<float>(),
              params.grad_factor.data_as<float>());
}

}  // namespace

void alpha_blend_forward_cuda(const BlendForward& params, Stream stream) {
  const DeviceGuard device(params.a.device_index);
  const BlendLayout& layout = params.layout;
  dispatch_floating_cuda("alpha_blend", "a", params.a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    if (layout.run.size % kWidth == 0 && is_vector(layout, params.a, kBlendA, kWidth) &&
        is_vector(layout, params.b, kBlendB, kWidth) &&
        is_vector(layout, params.out, kBlendOut, kWidth)) {
      launch_forward<T, kWidth>(params, stream);
    } else {
      launch_forward<T, 1>(params, stream);
    }
  });
}

void alpha_blend_backward_cuda(const BlendBackward& params, Stream stream) {
  const DeviceGuard device(params.grad_out.device_index);
  const BlendLayout& layout = params.layout;
  dispatch_floating_cuda("alpha_blend backward", "a", params.grad_out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    if (layout.run.size % kWidth == 0 && is_vector(layout, params.grad_out, kBlendOut, kWidth) &&
        is_vector(layout, params.a, kBlendA, kWidth) &&
        is_vector(layout, params.b, kBlendB, kWidth) &&
        is_vector(layout, params.grad_a, kBlendGradA, kWidth) &&
        is_vector(layout, params.grad_b, kBlendGradB, kWidth)) {
      launch_backward<T, kWidth>(params, stream);
    } else {
      launch_backward<T, 1>(params, stream);
    }
  });
}

}  // namespace vtok
