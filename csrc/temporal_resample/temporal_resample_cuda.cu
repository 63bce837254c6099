// temporal_resample on CUDA. Memory bound: a thread owns kWidth neighbouring pixels (16 bytes where
// the layout allows) and walks through kResampleFrames output frames, so that neighbouring threads
// read neighbouring vectors of every frame, and the frames that two outputs share are read a second
// time from L1. Offsets in [B, C, H, W] are computed once per thread, not once per frame. What a
// frame depends on is integer arithmetic that all threads of a block share: about 50 instructions
// per frame and vector, against the several hundred cycles that its 48 to 100 bytes take.
//
// The gradient of the factor: one partial sum per block, added by one more block in a fixed order;
// bitwise repeatable, no atomics.
#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "temporal_resample.h"
#include "temporal_resample_math.h"

namespace vtok {
namespace {

constexpr int kThreads = kResampleThreads;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr int64_t kMaxSegments = 65535;  // grid.y

// Data pointers of a call by ResampleTensor; null where absent.
template <typename T>
struct Pointers {
  T* data[kNumResampleTensors];
};

template <typename T>
Pointers<T> no_pointers() {
  Pointers<T> pointers;
  for (T*& data : pointers.data) data = nullptr;
  return pointers;
}

template <typename T>
void set(Pointers<T>& pointers, ResampleTensor tensor, const TensorView& view) {
  if (view.data != nullptr) pointers.data[tensor] = const_cast<T*>(view.data_as<T>());
}

// kWidth values in the arithmetic's type.
template <int kWidth>
struct Values {
  float values[kWidth] = {};

  template <typename T>
  __device__ __forceinline__ void add(float weight, const T* address) {
    const auto loaded = load_vector<Vector<T, kWidth>>(address);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] += weight * to_float(loaded.values[i]);
  }

  template <typename T>
  __device__ __forceinline__ void store(T* address) const {
    Vector<T, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.values[i] = from_float<T>(values[i]);
    store_vector(address, result);
  }
};

// scale * value[t] of a thread's pixels.
template <typename T, int kWidth>
__device__ __forceinline__ Values<kWidth> resample(const ResampleLayout& layout,
                                                   const Pointers<T>& pointers,
                                                   const ResampleOffsets& at, int t, float scale) {
  Values<kWidth> value;
  const SourceTaps<float> taps = source_taps<float>(layout.timing, t);
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    if (k >= taps.count) break;
    const SourceFrame source = source_frame(layout, taps.frame[k], false);
    value.add(scale * taps.weight[k],
              pointers.data[source.tensor] + at.of[source.tensor] + source.offset);
  }
  return value;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    temporal_resample_forward_kernel(const ResampleLayout layout,
                                     const Pointers<T> pointers,          // [B, C, T, H, W] each
                                     const float* __restrict__ factor) {  // []
  const int64_t pixel = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (pixel >= layout.num_pixels) return;
  const ResampleOffsets at = pixel_offsets(layout, pixel);
  const float alpha = layout.is_blend ? sigmoid_accurate(*factor) : 1.0f;
  const int first = static_cast<int>(blockIdx.y) * kResampleFrames;
  const int end = first + kResampleFrames;
  for (int t = first; t < end && t < layout.timing.num_outputs; ++t) {
    Values<kWidth> value = resample<T, kWidth>(layout, pointers, at, t, alpha);
    if (layout.is_blend) {
      value.add(1.0f - alpha, pointers.data[kResampleY] + at.of[kResampleY] +
                                  t * layout.frame_strides[kResampleY]);
    }
    value.store(pointers.data[kResampleOut] + at.of[kResampleOut] +
                t * layout.frame_strides[kResampleOut]);
  }
}

// Writes grad_y[t] and returns the pixels' sum of grad * (value[t] - y[t]).
template <typename T, int kWidth>
__device__ __forceinline__ float output_gradient(const ResampleLayout& layout,
                                                 const Pointers<T>& pointers,
                                                 const ResampleOffsets& at, int t, float alpha,
                                                 bool needs_sum) {
  Values<kWidth> grad;
  grad.add(1.0f, pointers.data[kResampleOut] + at.of[kResampleOut] +
                     t * layout.frame_strides[kResampleOut]);
  float sum = 0.0f;
  if (needs_sum) {
    Values<kWidth> difference = resample<T, kWidth>(layout, pointers, at, t, 1.0f);
    difference.add(-1.0f, pointers.data[kResampleY] + at.of[kResampleY] +
                              t * layout.frame_strides[kResampleY]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += grad.values[i] * difference.values[i];
  }
  if (pointers.data[kResampleGradY] != nullptr) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad.values[i] *= 1.0f - alpha;
    grad.store(pointers.data[kResampleGradY] + at.of[kResampleGradY] +
               t * layout.frame_strides[kResampleGradY]);
  }
  return sum;
}

// Writes the gradient of one source frame: the output frames that it feeds, weighted.
template <typename T, int kWidth>
__device__ __forceinline__ void source_gradient(const ResampleLayout& layout,
                                                const Pointers<T>& pointers,
                                                const ResampleOffsets& at, int source,
                                                float alpha) {
  const SourceFrame target = source_frame(layout, source, true);
  T* data = pointers.data[target.tensor];
  if (data == nullptr) return;
  const OutputRange range = output_range(layout.timing, source);
  Values<kWidth> value;
  for (int t = range.first; t <= range.last; ++t) {
    const float weight = source_weight<float>(layout.timing, t, source);
    if (weight == 0.0f) continue;
    value.add(alpha * weight, pointers.data[kResampleOut] + at.of[kResampleOut] +
                                  t * layout.frame_strides[kResampleOut]);
  }
  value.store(data + at.of[target.tensor] + target.offset);
}

// First of the source frames that segment `segment` of `num_segments` writes: an equal share each,
// which keeps them close to the output frames that the segment reads.
VTOK_FUNCTION int segment_source(const ResampleTiming& timing, int segment, int num_segments) {
  const int first = timing.has_front ? -timing.num_padding : 0;
  return first + static_cast<int>(int64_t{timing.num_sources - first} * segment / num_segments);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    temporal_resample_backward_kernel(const ResampleLayout layout,
                                      const Pointers<T> pointers,        // [B, C, T, H, W] each
                                      const float* __restrict__ factor,  // []
                                      float* __restrict__ partials) {    // [blocks]
  VTOK_SHARED(float, warp_sums, kThreads / kWarp);
  const int64_t pixel = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  float sum = 0.0f;
  if (pixel < layout.num_pixels) {
    const ResampleOffsets at = pixel_offsets(layout, pixel);
    const float alpha = layout.is_blend ? sigmoid_accurate(*factor) : 1.0f;
    const int segment = static_cast<int>(blockIdx.y);
    const int end = segment_source(layout.timing, segment + 1, static_cast<int>(gridDim.y));
    if (layout.is_blend) {
      const int first = segment * kResampleFrames;
      for (int t = first; t < first + kResampleFrames && t < layout.timing.num_outputs; ++t) {
        sum += output_gradient<T, kWidth>(layout, pointers, at, t, alpha, partials != nullptr);
      }
    }
    for (int source = segment_source(layout.timing, segment, static_cast<int>(gridDim.y));
         source < end; ++source) {
      source_gradient<T, kWidth>(layout, pointers, at, source, alpha);
    }
  }
  if (partials == nullptr) return;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += warp_sums[warp];
  partials[int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = total;
}

// One block adds the partial sums: each thread its share in order, then pairwise.
__global__ void __launch_bounds__(kThreads)
    temporal_resample_factor_kernel(const float* __restrict__ partials,  // [count]
                                    int64_t count,
                                    const float* __restrict__ factor,   // []
                                    float* __restrict__ grad_factor) {  // []
  VTOK_SHARED(float, sums, kThreads);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const float alpha = sigmoid_accurate(*factor);
  *grad_factor = sums[0] * (alpha * (1.0f - alpha));
}

// Whether `width` neighbouring pixels are one aligned vector in every tensor.
template <typename T>
bool is_vector(const ResampleLayout& layout, const Pointers<T>& pointers, int width) {
  bool vector = layout.run.size % width == 0;
  for (int tensor = 0; tensor < kNumResampleTensors; ++tensor) {
    if (pointers.data[tensor] == nullptr) continue;
    vector = vector && reinterpret_cast<uintptr_t>(pointers.data[tensor]) % 16 == 0 &&
             layout.run.strides[tensor] == 1 && layout.frame_strides[tensor] % width == 0;
    for (int dim = 0; dim < layout.num_outer; ++dim) {
      vector = vector && layout.outer[dim].strides[tensor] % width == 0;
    }
  }
  return vector;
}

dim3 grid_of(const ResampleLayout& layout, int width) {
  const int64_t blocks = (layout.num_pixels / width + kThreads - 1) / kThreads;
  const int64_t segments = (layout.timing.num_outputs + kResampleFrames - 1) / kResampleFrames;
  VTOK_CHECK_VALUE(blocks <= kMaxBlocks && segments <= kMaxSegments,
                   "temporal_resample: x has too many elements for one launch");
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(segments));
}

template <typename T, int kWidth>
void launch_backward(const ResampleBackward& params, const Pointers<T>& pointers, Stream stream) {
  const float* factor = params.factor.data != nullptr ? params.factor.data_as<float>() : nullptr;
  const bool needs_sum = params.grad_factor.data != nullptr;
  float* partials = needs_sum ? params.partials.data_as<float>() : nullptr;
  const dim3 grid = grid_of(params.layout, kWidth);
  VTOK_LAUNCH((temporal_resample_backward_kernel<T, kWidth>), grid, dim3(kThreads), 0, stream,
              params.layout, pointers, factor, partials);
  if (!needs_sum) return;
  VTOK_LAUNCH(temporal_resample_factor_kernel, dim3(1), dim3(kThreads), 0, stream,
              static_cast<const float*>(partials), int64_t{grid.x} * grid.y, factor,
              params.grad_factor.data_as<float>());
}

}  // namespace

void temporal_resample_forward_cuda(const ResampleForward& params, Stream stream) {
  const DeviceGuard device(params.out.device_index);
  dispatch_floating_cuda("temporal_resample", "x", params.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    Pointers<T> pointers = no_pointers<T>();
    set(pointers, kResampleX, params.x);
    set(pointers, kResampleCarried, params.carried);
    set(pointers, kResampleFront, params.front);
    set(pointers, kResampleY, params.y);
    set(pointers, kResampleOut, params.out);
    const float* factor = params.layout.is_blend ? params.factor.data_as<float>() : nullptr;
    if (is_vector(params.layout, pointers, kWidth)) {
      VTOK_LAUNCH((temporal_resample_forward_kernel<T, kWidth>), grid_of(params.layout, kWidth),
                  dim3(kThreads), 0, stream, params.layout, pointers, factor);
    } else {
      VTOK_LAUNCH((temporal_resample_forward_kernel<T, 1>), grid_of(params.layout, 1),
                  dim3(kThreads), 0, stream, params.layout, pointers, factor);
    }
  });
}

void temporal_resample_backward_cuda(const ResampleBackward& params, Stream stream) {
  const DeviceGuard device(params.grad_out.device_index);
  dispatch_floating_cuda("temporal_resample backward", "x", params.grad_out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    Pointers<T> pointers = no_pointers<T>();
    set(pointers, kResampleX, params.x);
    set(pointers, kResampleCarried, params.carried);
    set(pointers, kResampleY, params.y);
    set(pointers, kResampleOut, params.grad_out);
    set(pointers, kResampleGradX, params.grad_x);
    set(pointers, kResampleGradCarried, params.grad_carried);
    set(pointers, kResampleGradFront, params.grad_front);
    set(pointers, kResampleGradY, params.grad_y);
    if (is_vector(params.layout, pointers, kWidth)) {
      launch_backward<T, kWidth>(params, pointers, stream);
    } else {
      launch_backward<T, 1>(params, pointers, stream);
    }
  });
}

}  // namespace vtok
