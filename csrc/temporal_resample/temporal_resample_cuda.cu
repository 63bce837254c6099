// temporal_resample on CUDA. Memory bound: a thread owns kWidth neighbouring pixels (16 bytes where
// the layout allows) and walks through kResampleFrames output frames, so that neighbouring threads
// read neighbouring vectors of every frame. Forwards it loads what two output frames are made of
// before it computes either: 48 to 128 bytes in flight per thread. Source frames that two outputs
// share are read a second time from L1, those that two segments of outputs share from L2, because
// the blocks of all segments of a piece of pixels are neighbours in the grid. Offsets in
// [B, C, H, W] are computed once per thread. What a frame depends on is integer arithmetic that all
// threads of a block share: some 15 instructions per source frame.
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
constexpr int kAhead = 2;  // output frames that are loaded before one is computed
constexpr int64_t kMaxBlocks = 0x7fffffff;

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

// Segments of kResampleFrames output frames, and the one of this block; its threads take the
// `piece`-th kThreads vectors of pixels.
struct Place {
  int segment, num_segments;
  int64_t piece;

  __device__ __forceinline__ explicit Place(const ResampleLayout& layout)
      : num_segments((layout.timing.num_outputs + kResampleFrames - 1) / kResampleFrames) {
    piece = blockIdx.x / static_cast<unsigned>(num_segments);
    segment = static_cast<int>(blockIdx.x) - static_cast<int>(piece) * num_segments;
  }
};

// The pixels of one thread in the tensors [kFirst, kEnd), at frame 0.
template <typename T>
struct PixelPointers {
  T* data[kNumResampleTensors];

  template <int kFirst, int kEnd>
  __device__ __forceinline__ static PixelPointers at(const ResampleLayout& layout,
                                                     const Pointers<T>& pointers, int64_t pixel) {
    const ResampleOffsets offsets = pixel_offsets<kFirst, kEnd>(layout, pixel);
    PixelPointers result;
#pragma unroll
    for (int tensor = kFirst; tensor < kEnd; ++tensor) {
      T* const data = pointers.data[tensor];
      result.data[tensor] = data == nullptr ? nullptr : data + offsets.of[tensor];
    }
    return result;
  }

  __device__ __forceinline__ T* frame(const ResampleLayout& layout, ResampleTensor tensor,
                                      int number) const {
    return data[tensor] + number * layout.frame_strides[tensor];
  }

  // Of a source frame, or of its gradient (null if nobody needs it).
  template <bool kIsGradient>
  __device__ __forceinline__ T* source(const ResampleLayout& layout, int number) const {
    constexpr int kShift = kIsGradient ? kResampleGradX - kResampleX : 0;
    const SourceFrame at = source_frame(layout, number, kIsGradient);
    T* pointer = at.tensor == kResampleX + kShift         ? data[kResampleX + kShift]
                 : at.tensor == kResampleCarried + kShift ? data[kResampleCarried + kShift]
                                                          : data[kResampleFront + kShift];
    return pointer == nullptr ? nullptr : pointer + at.offset;
  }
};

// kWidth values in the arithmetic's type.
template <int kWidth>
struct Values {
  float values[kWidth];

  // Zeros, or weight * vector: products are not added to zeros.
  __device__ __forceinline__ Values() {
#pragma unroll
    for (float& value : values) value = 0.0f;
  }
  template <typename T>
  __device__ __forceinline__ Values(float weight, const Vector<T, kWidth>& vector) {
    vector_to_floats(vector, values);
#pragma unroll
    for (float& value : values) value *= weight;
  }

  template <typename T>
  __device__ __forceinline__ void add(float weight, const Vector<T, kWidth>& vector) {
    float more[kWidth];
    vector_to_floats(vector, more);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = __fmaf_rn(weight, more[i], values[i]);
  }

  template <typename T>
  __device__ __forceinline__ void store(T* address) const {
    store_vector(address, vector_from_floats<T>(values));
  }
};

// What value[t] is made of: up to kTaps source frames.
template <typename T, int kWidth, int kTaps>
struct Sources {
  VectorBits<Vector<T, kWidth>> bits[kTaps];
  float weights[kTaps];
  int count;

  __device__ __forceinline__ void load(const ResampleLayout& layout, const ResampleTiming& timing,
                                       const PixelPointers<T>& pixels, int t) {
    const SourceTaps<float> taps = source_taps<float>(timing, t);
    count = taps.count;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      weights[k] = taps.weight[k];
      if (k >= taps.count) continue;
      bits[k].load(pixels.template source<false>(layout, taps.frame[k]));
    }
  }

  // scale * value[t]
  __device__ __forceinline__ Values<kWidth> sum(float scale) const {
    if (count == 0) return Values<kWidth>();
    Values<kWidth> value(scale * weights[0], bits[0].vector());
#pragma unroll
    for (int k = 1; k < kTaps; ++k) {
      if (k < count) value.add(scale * weights[k], bits[k].vector());
    }
    return value;
  }
};

// Source frames of an output frame at most.
template <ResampleMode kMode>
constexpr int kNumTaps = kMode == ResampleMode::kMeanOfThree ? 3
                         : kMode == ResampleMode::kLinear    ? 2
                                                             : 1;

template <typename T, int kWidth, ResampleMode kMode>
__global__ void __launch_bounds__(kThreads)
    temporal_resample_forward_kernel(const ResampleLayout layout,
                                     const Pointers<T> pointers,          // [B, C, T, H, W] each
                                     const float* __restrict__ factor) {  // []
  const Place place(layout);
  const int64_t pixel = (place.piece * kThreads + threadIdx.x) * kWidth;
  if (pixel >= layout.num_pixels) return;
  const auto pixels =
      PixelPointers<T>::template at<kResampleX, kResampleOut + 1>(layout, pointers, pixel);
  const float alpha = layout.is_blend ? sigmoid_accurate(*factor) : 1.0f;
  ResampleTiming timing = layout.timing;
  timing.mode = kMode;  // known to the compiler
  const int first = place.segment * kResampleFrames;
  const int last = first + kResampleFrames;
  const int end = last < timing.num_outputs ? last : timing.num_outputs;
#pragma unroll 1
  for (int t = first; t < end; t += kAhead) {
    Sources<T, kWidth, kNumTaps<kMode>> sources[kAhead];
    VectorBits<Vector<T, kWidth>> y[kAhead];
    int frames[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      frames[i] = t + i < end ? t + i : end - 1;  // the last frame may be written twice
      sources[i].load(layout, timing, pixels, frames[i]);
      if (layout.is_blend) y[i].load(pixels.frame(layout, kResampleY, frames[i]));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      Values<kWidth> value = sources[i].sum(alpha);
      if (layout.is_blend) value.add(1.0f - alpha, y[i].vector());
      value.store(pixels.frame(layout, kResampleOut, frames[i]));
    }
  }
}

// Writes grad_y[t] and returns the pixels' sum of grad * (value[t] - y[t]).
template <typename T, int kWidth>
__device__ __forceinline__ float output_gradient(const ResampleLayout& layout,
                                                 const PixelPointers<T>& pixels, int t, float alpha,
                                                 bool needs_sum) {
  using Word = Vector<T, kWidth>;
  const auto grad_word = load_vector<Word>(pixels.frame(layout, kResampleOut, t));
  float sum = 0.0f;
  if (needs_sum) {
    Sources<T, kWidth, 3> sources;
    sources.load(layout, layout.timing, pixels, t);
    const auto y = load_vector<Word>(pixels.frame(layout, kResampleY, t));
    Values<kWidth> difference = sources.sum(1.0f);
    difference.add(-1.0f, y);
    float grad[kWidth];
    vector_to_floats(grad_word, grad);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum = __fmaf_rn(grad[i], difference.values[i], sum);
  }
  if (pixels.data[kResampleGradY] != nullptr) {
    Values<kWidth>(1.0f - alpha, grad_word).store(pixels.frame(layout, kResampleGradY, t));
  }
  return sum;
}

// Writes the gradient of one source frame: the output frames that it feeds, weighted.
template <typename T, int kWidth>
__device__ __forceinline__ void source_gradient(const ResampleLayout& layout,
                                                const PixelPointers<T>& pixels, int source,
                                                float alpha) {
  T* const target = pixels.template source<true>(layout, source);
  if (target == nullptr) return;
  const OutputRange range = output_range(layout.timing, source);
  Values<kWidth> value;
  for (int t = range.first; t <= range.last; ++t) {
    const float weight = source_weight<float>(layout.timing, t, source);
    if (weight == 0.0f) continue;
    value.add(alpha * weight,
              load_vector<Vector<T, kWidth>>(pixels.frame(layout, kResampleOut, t)));
  }
  value.store(target);
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
  const Place place(layout);
  const int64_t pixel = (place.piece * kThreads + threadIdx.x) * kWidth;
  float sum = 0.0f;
  if (pixel < layout.num_pixels) {
    const auto pixels =
        PixelPointers<T>::template at<0, kNumResampleTensors>(layout, pointers, pixel);
    const float alpha = layout.is_blend ? sigmoid_accurate(*factor) : 1.0f;
    const int end = segment_source(layout.timing, place.segment + 1, place.num_segments);
    if (layout.is_blend) {
      const int first = place.segment * kResampleFrames;
      for (int t = first; t < first + kResampleFrames && t < layout.timing.num_outputs; ++t) {
        sum += output_gradient<T, kWidth>(layout, pixels, t, alpha, partials != nullptr);
      }
    }
    for (int source = segment_source(layout.timing, place.segment, place.num_segments);
         source < end; ++source) {
      source_gradient<T, kWidth>(layout, pixels, source, alpha);
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
  partials[blockIdx.x] = total;
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
  VTOK_CHECK_VALUE(blocks <= kMaxBlocks / segments,
                   "temporal_resample: x has too many elements for one launch");
  return dim3(static_cast<unsigned>(blocks * segments));
}

template <typename T, int kWidth>
void launch_forward(const ResampleForward& params, const Pointers<T>& pointers, Stream stream) {
  const float* factor = params.layout.is_blend ? params.factor.data_as<float>() : nullptr;
  const auto launch = [&](auto mode) {
    constexpr ResampleMode kMode = decltype(mode)::value;
    VTOK_LAUNCH((temporal_resample_forward_kernel<T, kWidth, kMode>),
                grid_of(params.layout, kWidth), dim3(kThreads), 0, stream, params.layout, pointers,
                factor);
  };
  using std::integral_constant;
  switch (params.layout.timing.mode) {
    case ResampleMode::kMeanOfThree:
      return launch(integral_constant<ResampleMode, ResampleMode::kMeanOfThree>{});
    case ResampleMode::kNearest:
      return launch(integral_constant<ResampleMode, ResampleMode::kNearest>{});
    case ResampleMode::kLinear:
      return launch(integral_constant<ResampleMode, ResampleMode::kLinear>{});
  }
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
              static_cast<const float*>(partials), int64_t{grid.x}, factor,
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
    if (is_vector(params.layout, pointers, kWidth)) {
      launch_forward<T, kWidth>(params, pointers, stream);
    } else {
      launch_forward<T, 1>(params, pointers, stream);
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
