// What the CUDA kernels of norm_act share: how they see their arguments, access to memory of a
// dtype known at run time, and where copies of frame 0 go.
//
// Only the dtype of x is a template argument. y, weight and bias are accessed through a switch that
// all threads take alike: it costs nothing beside the memory access, and the alternative is nine
// times as many kernels.
#pragma once

#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "norm_act.h"
#include "norm_act_math.h"

namespace vtok {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kFullWarp = 0xffffffffu;
// Warps per block of the `any` kernels, each with partial sums of its own.
constexpr int kAnyWarps = 4;

// A floating array of a dtype known at run time.
struct AnyArray {
  void* data;
  DType dtype;
};

inline AnyArray any_array(const TensorView& view) {
  return {view.data, view.dtype};
}

struct KernelLayout {
  NormActRows rows;
  int front_copies;      // copies of frame 0 in front of it
  int64_t frame_stride;  // in elements of y
  int64_t rows_per_frame;
  int channels, num_groups;
  float share;  // 1 / channels
  float eps;
  bool subtract_mean, act;
};

inline KernelLayout kernel_layout(const NormActLayout& layout) {
  KernelLayout kernel{};
  kernel.rows = layout.rows;
  kernel.front_copies = layout.buffer.replicate ? static_cast<int>(layout.buffer.front) : 0;
  kernel.frame_stride = layout.buffer.frame_stride;
  kernel.rows_per_frame = layout.rows_per_frame;
  kernel.channels = static_cast<int>(layout.channels);
  kernel.num_groups = static_cast<int>(layout.num_groups);
  kernel.share = 1.0f / static_cast<float>(layout.channels);
  kernel.eps = static_cast<float>(layout.eps);
  kernel.subtract_mean = subtracts_mean(layout.kind);
  kernel.act = layout.act;
  return kernel;
}

// N consecutive elements from `index` on, a multiple of N at an aligned address.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* data, int64_t index, float (&values)[N]) {
  if constexpr (N * sizeof(T) <= 16) {
    vector_to_floats(load_vector<Vector<T, N>>(data + index), values);
  } else {
    constexpr int kPerWord = 16 / sizeof(T);
#pragma unroll
    for (int first = 0; first < N; first += kPerWord) {
      const auto word = load_vector<Vector<T, kPerWord>>(data + index + first);
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) values[first + i] = to_float(word.values[i]);
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_floats(T* data, int64_t index, const float (&values)[N]) {
  constexpr int kPerWord = N * sizeof(T) > 16 ? static_cast<int>(16 / sizeof(T)) : N;
#pragma unroll
  for (int first = 0; first < N; first += kPerWord) {
    Vector<T, kPerWord> word;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) word.values[i] = from_float<T>(values[first + i]);
    store_vector(data + index + first, word);
  }
}

// N consecutive elements at any address.
template <typename T, int N>
__device__ __forceinline__ void load_single_floats(const T* data, int64_t index,
                                                   float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(data[index + i]);
}

// Calls function(data) with a pointer of the right type.
template <typename Function>
__device__ __forceinline__ void with_data(const AnyArray& array, const Function& function) {
  switch (array.dtype) {
    case DType::kFloat16: return function(static_cast<float16*>(array.data));
    case DType::kBFloat16: return function(static_cast<bfloat16*>(array.data));
    default: return function(static_cast<float*>(array.data));
  }
}

template <int N>
__device__ __forceinline__ void load_floats(const AnyArray& array, int64_t index,
                                            float (&values)[N]) {
  with_data(array, [&](const auto* data) { load_floats(data, index, values); });
}

template <int N>
__device__ __forceinline__ void store_floats(const AnyArray& array, int64_t index,
                                             const float (&values)[N]) {
  with_data(array, [&](auto* data) { store_floats(data, index, values); });
}

// One element; `otherwise` of an absent array.
__device__ __forceinline__ float load_float(const AnyArray& array, int64_t index, float otherwise) {
  if (array.data == nullptr) return otherwise;
  float value[1];
  load_floats(array, index, value);
  return value[0];
}

// y and its copies in front of frame 0.
template <int N>
__device__ __forceinline__ void store_result(const KernelLayout& layout, const AnyArray& y,
                                             const RowOffsets& at, int channel,
                                             const float (&values)[N]) {
  store_floats(y, at.y + channel, values);
  if (!at.is_first_frame) return;
#pragma unroll 1
  for (int k = 1; k <= layout.front_copies; ++k) {
    store_floats(y, at.y - k * layout.frame_stride + channel, values);
  }
}

// The gradient of y plus those of its copies.
template <int N>
__device__ __forceinline__ void load_gradient(const KernelLayout& layout, const AnyArray& grad_y,
                                              const RowOffsets& at, int channel,
                                              float (&values)[N]) {
  load_floats(grad_y, at.y + channel, values);
  if (!at.is_first_frame) return;
#pragma unroll 1
  for (int k = 1; k <= layout.front_copies; ++k) {
    float more[N];
    load_floats(grad_y, at.y - k * layout.frame_stride + channel, more);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += more[i];
  }
}

// Sum over the kLanes lanes (a power of 2) that share a row; every lane gets it.
template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

__device__ __forceinline__ void store_statistics(float* stats, uint32_t row, float mean,
                                                 float rstd) {
  stats[int64_t{row} * 2] = mean;
  stats[int64_t{row} * 2 + 1] = rstd;
}

// The gradient of u = n * weight + bias.
__device__ __forceinline__ float grad_preactivation(bool act, float u, float grad_y) {
  return act ? grad_y * silu_slope(u) : grad_y;
}

// Whether vectors of `width` elements of every row of x, y and grad_x are aligned to 16 bytes, or
// to their size where that is less.
inline bool is_aligned(const TensorView& view, int width) {
  const uintptr_t bytes = size_of(view.dtype) * static_cast<size_t>(width);
  return reinterpret_cast<uintptr_t>(view.data) % (bytes < 16 ? bytes : 16) == 0;
}

inline unsigned num_blocks(int64_t num_rows, int rows_per_block, int64_t most) {
  const int64_t needed = (num_rows + rows_per_block - 1) / rows_per_block;
  return static_cast<unsigned>(needed < most ? needed : most);
}

inline bool has_vector_rows(const NormActLayout& layout, int width) {
  bool vectors = layout.channels % width == 0 && layout.rows.y_offset % width == 0;
  for (int dim = 0; dim < layout.rows.num_dims; ++dim) {
    vectors = vectors && layout.rows.x_strides[dim] % width == 0 &&
              layout.rows.y_strides[dim] % width == 0;
  }
  return vectors;
}

}  // namespace

// Sums partials [num_parts, 2, C] into the gradients of weight and bias, in the order of the parts
// within each of a fixed number of slices. Defined in norm_act_cuda.cu.
void launch_sum_partials(const NormActBackward& params, const float* partials, int64_t num_parts,
                         Stream stream);

// Writes everything of y that no row of x is written to. Defined in norm_act_cuda_fill.cu.
void launch_fill_surroundings(const NormActForward& params, Stream stream);

// norm_act_cuda_any.cu; the backward pass returns the number of partials that it wrote.
void norm_act_forward_any(const NormActForward& params, int64_t most_blocks, Stream stream);
int64_t norm_act_backward_any(const NormActBackward& params, float* partials, int64_t most_blocks,
                              Stream stream);

// norm_act_cuda_group.cu and norm_act_cuda_group_backward.cu.
void norm_act_forward_groups(const NormActForward& params, Stream stream);
void norm_act_backward_groups(const NormActBackward& params, Stream stream);
int64_t norm_act_workspace_groups(const NormActLayout& layout, bool backward);

}  // namespace vtok
