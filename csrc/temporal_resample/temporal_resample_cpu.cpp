// temporal_resample on the CPU, forward and backward in one pass over time each.
//
// The pixels are cut into slices that do not depend on the number of threads; a thread takes a
// slice through all frames, so that the two or three frames that outputs share are still in its L2
// cache when they are needed again. A frame of a slice is worked on in chunks, whose value or
// gradient is added up in a buffer in L1: one loop serves every number of taps.
#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "temporal_resample.h"
#include "temporal_resample_math.h"

namespace vtok::VTOK_ISA {

// The about eight frames of a slice that a step of the backward pass touches are 256 KB in float32.
// Shorter slices, down to a chunk, cost up to a third of the speed: each frame begins a new stream.
constexpr int64_t kSlice = kResamplePiecePixels;
// A chunk's buffer and running sums are 8 KB in float32.
constexpr int64_t kChunk = 1024;
// Pixels x frames that are worth a second thread: about 5 us of work.
constexpr int64_t kGrainElements = 16384;

template <typename T>
using real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
VTOK_FUNCTION real<T> load(const T* address) {
  if constexpr (std::is_same_v<T, double>) {
    return *address;
  } else {
    return to_float(*address);
  }
}

template <typename T>
VTOK_FUNCTION void store(T* address, real<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    *address = value;
  } else {
    *address = from_float<T>(value);
  }
}

// `count` pixels of one frame, `stride` elements apart.
template <typename T>
struct Pixels {
  T* data;
  int64_t stride;
};

// Calls function(stride) with the constant 1 where the stride is 1, so that its loop is vectorised.
template <typename Function>
VTOK_FUNCTION void with_stride(int64_t stride, const Function& function) {
  if (stride == 1) {
    function(std::integral_constant<int64_t, 1>{});
  } else {
    function(stride);
  }
}

// buffer = weight * source, or buffer += weight * source
template <typename T>
static void add_frame(real<T>* buffer, bool is_first, real<T> weight, Pixels<const T> source,
                      int64_t count) {
  with_stride(source.stride, [&](auto stride) {
    if (is_first) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) buffer[i] = weight * load(source.data + i * stride);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) buffer[i] += weight * load(source.data + i * stride);
    }
  });
}

// target = scale * buffer
template <typename T>
static void store_frame(Pixels<T> target, real<T> scale, const real<T>* buffer, int64_t count) {
  with_stride(target.stride, [&](auto stride) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) store(target.data + i * stride, scale * buffer[i]);
  });
}

// target = alpha * buffer + (1 - alpha) * y
template <typename T>
static void blend_frame(Pixels<T> target, real<T> alpha, const real<T>* buffer, Pixels<const T> y,
                        int64_t count) {
  const real<T> beta = real<T>(1) - alpha;
  with_stride(target.stride, [&](auto target_stride) {
    with_stride(y.stride, [&](auto y_stride) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        store(target.data + i * target_stride,
              alpha * buffer[i] + beta * load(y.data + i * y_stride));
      }
    });
  });
}

// sum += grad * (buffer - y)
template <typename T>
static void sum_frame(real<T>* sum, Pixels<const T> grad, const real<T>* buffer, Pixels<const T> y,
                      int64_t count) {
  with_stride(grad.stride, [&](auto grad_stride) {
    with_stride(y.stride, [&](auto y_stride) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        sum[i] += load(grad.data + i * grad_stride) * (buffer[i] - load(y.data + i * y_stride));
      }
    });
  });
}

// All sums added pairwise, in an order that every instruction set shares; destroys them.
template <typename Real>
static Real add_up(Real* sum) {
  for (int64_t width = kChunk / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Data pointers of a call by ResampleTensor; null where absent.
template <typename T>
struct Pointers {
  T* data[kNumResampleTensors] = {};

  void set(ResampleTensor tensor, const TensorView& view) {
    if (view.data == nullptr) return;
    data[tensor] = const_cast<T*>(view.data_as<T>());
  }
};

// Neighbours of a run: up to kSlice of them, or a chunk of those.
template <typename T>
struct Slice {
  const ResampleLayout& layout;
  const Pointers<T>& pointers;
  ResampleOffsets offsets;
  int64_t count;

  // Calls function(chunk) for pieces of at most kChunk.
  template <typename Function>
  void for_each_chunk(const Function& function) const {
    Slice chunk = *this;
    for (int64_t begin = 0; begin < count; begin += kChunk) {
      chunk.count = count - begin < kChunk ? count - begin : kChunk;
      function(static_cast<const Slice&>(chunk));
      for (int tensor = 0; tensor < kNumResampleTensors; ++tensor) {
        chunk.offsets.of[tensor] += kChunk * layout.run.strides[tensor];
      }
    }
  }

  Pixels<T> pixels(ResampleTensor tensor, int64_t frame_offset) const {
    return {pointers.data[tensor] + offsets.of[tensor] + frame_offset, layout.run.strides[tensor]};
  }
  Pixels<T> frame(ResampleTensor tensor, int64_t frame) const {
    return pixels(tensor, frame * layout.frame_strides[tensor]);
  }
  Pixels<const T> input(ResampleTensor tensor, int64_t frame_number) const {
    const Pixels<T> found = frame(tensor, frame_number);
    return {found.data, found.stride};
  }
};

// value[t] of a slice.
template <typename T>
static void resample_frame(const Slice<T>& slice, int t, real<T>* buffer) {
  const SourceTaps<real<T>> taps = source_taps<real<T>>(slice.layout.timing, t);
  for (int k = 0; k < taps.count; ++k) {
    const SourceFrame at = source_frame(slice.layout, taps.frame[k], false);
    const Pixels<T> source = slice.pixels(at.tensor, at.offset);
    add_frame<T>(buffer, k == 0, taps.weight[k], {source.data, source.stride}, slice.count);
  }
  if (taps.count > 0) return;
  for (int64_t i = 0; i < slice.count; ++i) buffer[i] = 0;
}

template <typename T>
static void forward_slice(const Slice<T>& slice, real<T> alpha) {
  alignas(64) real<T> buffer[kChunk];
  for (int t = 0; t < slice.layout.timing.num_outputs; ++t) {
    slice.for_each_chunk([&](const Slice<T>& chunk) {
      resample_frame(chunk, t, buffer);
      const Pixels<T> out = chunk.frame(kResampleOut, t);
      if (slice.layout.is_blend) {
        blend_frame(out, alpha, buffer, chunk.input(kResampleY, t), chunk.count);
      } else {
        store_frame(out, real<T>(1), buffer, chunk.count);
      }
    });
  }
}

// Cuts pixels [begin, end) into slices.
template <typename T, typename Function>
static void for_each_slice(const ResampleLayout& layout, const Pointers<T>& pointers, int64_t begin,
                           int64_t end, const Function& function) {
  while (begin < end) {
    const int64_t run_end = (begin / layout.run.size + 1) * layout.run.size;
    int64_t count = (run_end < end ? run_end : end) - begin;
    count = count < kSlice ? count : kSlice;
    function(Slice<T>{layout, pointers, pixel_offsets(layout, begin), count});
    begin += count;
  }
}

// First pixel of piece `piece`: a multiple of kSlice, whatever the number of threads.
static int64_t piece_begin(const ResampleLayout& layout, int64_t num_pieces, int64_t piece) {
  const int64_t slices = (layout.num_pixels + kSlice - 1) / kSlice;
  const int64_t begin = (slices + num_pieces - 1) / num_pieces * piece * kSlice;
  return begin < layout.num_pixels ? begin : layout.num_pixels;
}

static int64_t num_pieces(const ResampleLayout& layout) {
  const int64_t slices = (layout.num_pixels + kSlice - 1) / kSlice;
  return slices < kResamplePieces ? slices : kResamplePieces;
}

static int64_t piece_grain(const ResampleLayout& layout) {
  const int64_t frames = layout.timing.num_outputs + layout.timing.num_sources + 1;
  const int64_t grain = kGrainElements / (layout.num_pixels / num_pieces(layout) * frames + 1);
  return grain > 1 ? grain : 1;
}

void temporal_resample_forward(const ResampleForward& params) {
  const ResampleLayout& layout = params.layout;
  dispatch_floating("temporal_resample", "x", params.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Pointers<T> pointers;
    pointers.set(kResampleX, params.x);
    pointers.set(kResampleCarried, params.carried);
    pointers.set(kResampleFront, params.front);
    pointers.set(kResampleY, params.y);
    pointers.set(kResampleOut, params.out);
    const real<T> alpha =
        layout.is_blend ? sigmoid_accurate(*params.factor.data_as<real<T>>()) : real<T>(1);
    const int64_t pieces = num_pieces(layout);
    parallel_for(pieces, piece_grain(layout), params.num_threads, [&](int64_t begin, int64_t end) {
      for_each_slice(layout, pointers, piece_begin(layout, pieces, begin),
                     piece_begin(layout, pieces, end),
                     [&](const Slice<T>& slice) { forward_slice(slice, alpha); });
    });
  });
}

// The gradient of source frame `source`: the output frames that it feeds, weighted.
template <typename T>
static void source_gradient(const Slice<T>& slice, int source, real<T> alpha, real<T>* buffer) {
  const ResampleTiming& timing = slice.layout.timing;
  const SourceFrame at = source_frame(slice.layout, source, true);
  if (slice.pointers.data[at.tensor] == nullptr) return;
  const OutputRange range = output_range(timing, source);
  bool is_first = true;
  for (int t = range.first; t <= range.last; ++t) {
    const real<T> weight = source_weight<real<T>>(timing, t, source);
    if (weight == 0) continue;
    add_frame<T>(buffer, is_first, weight, slice.input(kResampleOut, t), slice.count);
    is_first = false;
  }
  if (is_first) {
    for (int64_t i = 0; i < slice.count; ++i) buffer[i] = 0;
  }
  store_frame(slice.pixels(at.tensor, at.offset), alpha, buffer, slice.count);
}

// Writes grad_y[t] and adds grad * (value[t] - y[t]) to `sum`.
template <typename T>
static void output_gradient(const Slice<T>& slice, int t, real<T> alpha, real<T>* sum,
                            real<T>* buffer) {
  const Pixels<const T> grad = slice.input(kResampleOut, t);
  if (sum != nullptr) {
    resample_frame(slice, t, buffer);
    sum_frame(sum, grad, buffer, slice.input(kResampleY, t), slice.count);
  }
  if (slice.pointers.data[kResampleGradY] == nullptr) return;
  add_frame<T>(buffer, true, real<T>(1) - alpha, grad, slice.count);
  store_frame(slice.frame(kResampleGradY, t), real<T>(1), buffer, slice.count);
}

// Runs over the output frames; each source frame follows as soon as the last output frame that it
// feeds has been read.
template <typename T>
static void backward_slice(const Slice<T>& slice, real<T> alpha, real<T>* sum) {
  alignas(64) real<T> buffer[kChunk];
  const ResampleTiming& timing = slice.layout.timing;
  int source = timing.has_front ? -timing.num_padding : 0;
  for (int t = 0; t <= timing.num_outputs; ++t) {
    if (t < timing.num_outputs) {
      slice.for_each_chunk(
          [&](const Slice<T>& chunk) { output_gradient(chunk, t, alpha, sum, buffer); });
    }
    // Behind the last output frame all source frames that are left.
    for (; source < timing.num_sources &&
           (t == timing.num_outputs || output_range(timing, source).last <= t);
         ++source) {
      slice.for_each_chunk(
          [&](const Slice<T>& chunk) { source_gradient(chunk, source, alpha, buffer); });
    }
  }
}

template <typename T>
static void backward_pieces(const ResampleBackward& params, const Pointers<T>& pointers,
                            int64_t begin, int64_t end) {
  using Real = real<T>;
  const ResampleLayout& layout = params.layout;
  const Real alpha = layout.is_blend ? sigmoid_accurate(*params.factor.data_as<Real>()) : Real(1);
  const bool needs_sum = params.grad_factor.data != nullptr;
  alignas(64) Real sum[kChunk];
  for (int64_t piece = begin; piece < end; ++piece) {
    for (int64_t i = 0; i < kChunk; ++i) sum[i] = 0;
    for_each_slice(layout, pointers, piece_begin(layout, num_pieces(layout), piece),
                   piece_begin(layout, num_pieces(layout), piece + 1), [&](const Slice<T>& slice) {
                     backward_slice(slice, alpha, needs_sum ? sum : nullptr);
                   });
    if (needs_sum) params.partials.data_as<Real>()[piece] = add_up(sum);
  }
}

void temporal_resample_backward(const ResampleBackward& params) {
  const ResampleLayout& layout = params.layout;
  dispatch_floating("temporal_resample backward", "x", params.grad_out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Real = real<T>;
    Pointers<T> pointers;
    pointers.set(kResampleX, params.x);
    pointers.set(kResampleCarried, params.carried);
    pointers.set(kResampleY, params.y);
    pointers.set(kResampleOut, params.grad_out);
    pointers.set(kResampleGradX, params.grad_x);
    pointers.set(kResampleGradCarried, params.grad_carried);
    pointers.set(kResampleGradFront, params.grad_front);
    pointers.set(kResampleGradY, params.grad_y);
    parallel_for(
        num_pieces(layout), piece_grain(layout), params.num_threads,
        [&](int64_t begin, int64_t end) { backward_pieces(params, pointers, begin, end); });
    if (params.grad_factor.data == nullptr) return;
    const Real* partials = params.partials.data_as<Real>();
    double total = 0;
    for (int64_t piece = 0; piece < num_pieces(layout); ++piece) total += partials[piece];
    const Real alpha = sigmoid_accurate(*params.factor.data_as<Real>());
    *params.grad_factor.data_as<Real>() = static_cast<Real>(total) * (alpha * (Real(1) - alpha));
  });
}

}  // namespace vtok::VTOK_ISA

VTOK_CPU_DISPATCH(temporal_resample_forward, ResampleForward)
VTOK_CPU_DISPATCH(temporal_resample_backward, ResampleBackward)
