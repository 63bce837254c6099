// temporal_resample on the CPU, forward and backward in one pass over time each.
//
// The pixels are cut into slices that do not depend on the number of threads; a thread takes a
// slice through all frames, so that the two or three frames that outputs share are still in its L2
// cache when they are needed again. Every frame written, output or gradient, is a weighted sum of a
// few frames ("taps"), whose number is a template argument of the loop that does it.
#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "temporal_resample.h"
#include "temporal_resample_math.h"

namespace vtok::VTOK_ISA {

// Pixels of a slice. Each frame of a slice begins a new stream of memory, so long slices are faster
// (measured: 1,024 pixels take up to twice the time of 65,536) as long as the frames that are
// shared stay in a cache; but there should be enough slices for many threads. The sizes of a call
// alone decide, not the number of threads.
constexpr int64_t kShortestSlice = 4096;
constexpr int64_t kLongestSlice = 65536;
constexpr int64_t kWantedSlices = 32;
// Running sums of the factor's gradient: 4 KB in float32.
constexpr int64_t kSums = 1024;
// A first frame that is repeated in front feeds up to 4 + kResampleMaxPadding output frames.
constexpr int kMaxTaps = 4 + kResampleMaxPadding;
// Pixels x frames that are worth a second thread: about 5 us of work.
constexpr int64_t kGrainElements = 16384;

// `count` pixels of one frame, `stride` elements apart.
template <typename T>
struct Pixels {
  T* data;
  int64_t stride;
};

// A weighted sum of frames.
template <typename T>
struct Taps {
  int count = 0;
  const T* data[kMaxTaps];
  int64_t stride[kMaxTaps];
  real<T> weight[kMaxTaps];

  void add(real<T> tap_weight, Pixels<T> frame) {
    data[count] = frame.data;
    stride[count] = frame.stride;
    weight[count++] = tap_weight;
  }
};

// kCount: number of taps, -1 for any. kUnit: every stride is 1. By value: a copy that nothing else
// points to stays in registers throughout the loop.
template <int kCount, bool kUnit, typename T>
VTOK_FUNCTION real<T> value_at(const Taps<T>& taps, int64_t i) {
  if constexpr (kCount == 0) return 0;
  const int count = kCount < 0 ? taps.count : kCount;
  real<T> value = taps.weight[0] * load(taps.data[0] + (kUnit ? i : i * taps.stride[0]));
  for (int k = 1; k < count; ++k) {
    value += taps.weight[k] * load(taps.data[k] + (kUnit ? i : i * taps.stride[k]));
  }
  return value;
}

// target = scale * value
template <int kCount, bool kUnit, typename T>
static void write_value(Taps<T> taps, real<T> scale, Pixels<T> target, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    store(target.data + (kUnit ? i : i * target.stride), scale * value_at<kCount, kUnit>(taps, i));
  }
}

// target = alpha * value + (1 - alpha) * y
template <int kCount, bool kUnit, typename T>
static void write_blend(Taps<T> taps, real<T> alpha, Pixels<T> y, Pixels<T> target, int64_t count) {
  const real<T> beta = real<T>(1) - alpha;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    store(target.data + (kUnit ? i : i * target.stride),
          alpha * value_at<kCount, kUnit>(taps, i) +
              beta * load(y.data + (kUnit ? i : i * y.stride)));
  }
}

// sum += grad * (value - y)
template <int kCount, bool kUnit, typename T>
static void add_sums(Taps<T> taps, Pixels<T> grad, Pixels<T> y, real<T>* sum, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    sum[i] += load(grad.data + (kUnit ? i : i * grad.stride)) *
              (value_at<kCount, kUnit>(taps, i) - load(y.data + (kUnit ? i : i * y.stride)));
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls function(number of taps, whether all strides are 1) with constants.
template <typename Function>
static void dispatch_taps(int count, bool is_unit, const Function& function) {
  if (count == 0) return function(Constant<0>{}, std::false_type{});  // zeros
  if (!is_unit) return function(Constant<-1>{}, std::false_type{});
  switch (count) {
    case 1: return function(Constant<1>{}, std::true_type{});
    case 2: return function(Constant<2>{}, std::true_type{});
    case 3: return function(Constant<3>{}, std::true_type{});
    case 4: return function(Constant<4>{}, std::true_type{});
    default: return function(Constant<-1>{}, std::true_type{});
  }
}

// All sums added pairwise, in an order that every instruction set shares; destroys them.
template <typename Real>
static Real add_up(Real* sum) {
  for (int64_t width = kSums / 2; width > 0; width /= 2) {
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

// Neighbours of a run, through all frames.
template <typename T>
struct Slice {
  const ResampleLayout& layout;
  const Pointers<T>& pointers;
  bool is_unit;
  ResampleOffsets offsets;
  int64_t count;

  Pixels<T> pixels(ResampleTensor tensor, int64_t frame_offset) const {
    return {pointers.data[tensor] + offsets.of[tensor] + frame_offset, layout.run.strides[tensor]};
  }
  Pixels<T> frame(ResampleTensor tensor, int64_t number) const {
    return pixels(tensor, number * layout.frame_strides[tensor]);
  }
  // At most `most` pixels from `begin` on.
  Slice part(int64_t begin, int64_t most) const {
    Slice result = *this;
    result.count = count - begin < most ? count - begin : most;
    for (int tensor = 0; tensor < kNumResampleTensors; ++tensor) {
      result.offsets.of[tensor] += begin * layout.run.strides[tensor];
    }
    return result;
  }
};

// The frames whose weighted sum is value[t].
template <typename T>
static Taps<T> value_taps(const Slice<T>& slice, int t) {
  const SourceTaps<real<T>> sources = source_taps<real<T>>(slice.layout.timing, t);
  Taps<T> taps;
  for (int k = 0; k < sources.count; ++k) {
    const SourceFrame at = source_frame(slice.layout, sources.frame[k], false);
    taps.add(sources.weight[k], slice.pixels(at.tensor, at.offset));
  }
  return taps;
}

template <typename T>
static void forward_slice(const Slice<T>& slice, real<T> alpha) {
  for (int t = 0; t < slice.layout.timing.num_outputs; ++t) {
    const Taps<T> taps = value_taps(slice, t);
    const Pixels<T> out = slice.frame(kResampleOut, t);
    dispatch_taps(taps.count, slice.is_unit, [&](auto count, auto unit) {
      constexpr int kCount = decltype(count)::value;
      constexpr bool kUnit = decltype(unit)::value;
      if (slice.layout.is_blend) {
        write_blend<kCount, kUnit>(taps, alpha, slice.frame(kResampleY, t), out, slice.count);
      } else {
        write_value<kCount, kUnit>(taps, real<T>(1), out, slice.count);
      }
    });
  }
}

static int64_t slice_pixels(const ResampleLayout& layout) {
  const int64_t wanted = layout.num_pixels / kWantedSlices / kSums * kSums;
  if (wanted < kShortestSlice) return kShortestSlice;
  return wanted < kLongestSlice ? wanted : kLongestSlice;
}

// Cuts pixels [begin, end) into slices.
template <typename T, typename Function>
static void for_each_slice(const ResampleLayout& layout, const Pointers<T>& pointers, int64_t begin,
                           int64_t end, const Function& function) {
  const int64_t slice = slice_pixels(layout);
  bool is_unit = true;
  for (int tensor = 0; tensor < kNumResampleTensors; ++tensor) {
    is_unit = is_unit && (pointers.data[tensor] == nullptr || layout.run.strides[tensor] == 1);
  }
  while (begin < end) {
    const int64_t run_end = (begin / layout.run.size + 1) * layout.run.size;
    int64_t count = (run_end < end ? run_end : end) - begin;
    count = count < slice ? count : slice;
    function(Slice<T>{layout, pointers, is_unit, pixel_offsets(layout, begin), count});
    begin += count;
  }
}

static int64_t num_pieces(const ResampleLayout& layout) {
  const int64_t slice = slice_pixels(layout);
  const int64_t slices = (layout.num_pixels + slice - 1) / slice;
  return slices < kResamplePieces ? slices : kResamplePieces;
}

// First pixel of piece `piece`: a multiple of the slice.
static int64_t piece_begin(const ResampleLayout& layout, int64_t piece) {
  const int64_t slice = slice_pixels(layout), pieces = num_pieces(layout);
  const int64_t slices = (layout.num_pixels + slice - 1) / slice;
  const int64_t begin = (slices + pieces - 1) / pieces * piece * slice;
  return begin < layout.num_pixels ? begin : layout.num_pixels;
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
    parallel_for(num_pieces(layout), piece_grain(layout), params.num_threads,
                 [&](int64_t begin, int64_t end) {
                   for_each_slice(layout, pointers, piece_begin(layout, begin),
                                  piece_begin(layout, end),
                                  [&](const Slice<T>& slice) { forward_slice(slice, alpha); });
                 });
  });
}

// The gradient of source frame `source`: the output frames that it feeds, weighted.
template <typename T>
static void source_gradient(const Slice<T>& slice, int source, real<T> alpha) {
  const ResampleTiming& timing = slice.layout.timing;
  const SourceFrame at = source_frame(slice.layout, source, true);
  if (slice.pointers.data[at.tensor] == nullptr) return;
  const OutputRange range = output_range(timing, source);
  Taps<T> taps;
  for (int t = range.first; t <= range.last; ++t) {
    const real<T> weight = source_weight<real<T>>(timing, t, source);
    if (weight != 0) taps.add(weight, slice.frame(kResampleOut, t));
  }
  dispatch_taps(taps.count, slice.is_unit, [&](auto count, auto unit) {
    write_value<decltype(count)::value, decltype(unit)::value>(
        taps, alpha, slice.pixels(at.tensor, at.offset), slice.count);
  });
}

// Writes grad_y[t] and adds grad * (value[t] - y[t]) to `sum`, for at most kSums pixels.
template <typename T>
static void output_gradient(const Slice<T>& slice, int t, real<T> alpha, real<T>* sum) {
  const Pixels<T> grad = slice.frame(kResampleOut, t);
  if (slice.pointers.data[kResampleGradY] != nullptr) {
    Taps<T> scaled;
    scaled.add(real<T>(1) - alpha, grad);
    dispatch_taps(1, slice.is_unit, [&](auto count, auto unit) {
      write_value<decltype(count)::value, decltype(unit)::value>(
          scaled, real<T>(1), slice.frame(kResampleGradY, t), slice.count);
    });
  }
  if (sum == nullptr) return;
  const Taps<T> taps = value_taps(slice, t);
  dispatch_taps(taps.count, slice.is_unit, [&](auto count, auto unit) {
    add_sums<decltype(count)::value, decltype(unit)::value>(taps, grad, slice.frame(kResampleY, t),
                                                            sum, slice.count);
  });
}

// Runs over the output frames; each source frame follows as soon as the last output frame that it
// feeds has been read.
template <typename T>
static void backward_slice(const Slice<T>& slice, real<T> alpha, real<T>* sum) {
  const ResampleTiming& timing = slice.layout.timing;
  int source = timing.has_front ? -timing.num_padding : 0;
  for (int t = 0; t < timing.num_outputs; ++t) {
    // In chunks, so that the gradient is read from memory once for its two uses.
    for (int64_t begin = 0; slice.layout.is_blend && begin < slice.count; begin += kSums) {
      output_gradient(slice.part(begin, kSums), t, alpha, sum);
    }
    for (; source < timing.num_sources && output_range(timing, source).last <= t; ++source) {
      source_gradient(slice, source, alpha);
    }
  }
  for (; source < timing.num_sources; ++source) source_gradient(slice, source, alpha);
}

template <typename T>
static void backward_pieces(const ResampleBackward& params, const Pointers<T>& pointers,
                            int64_t begin, int64_t end) {
  using Real = real<T>;
  const ResampleLayout& layout = params.layout;
  const Real alpha = layout.is_blend ? sigmoid_accurate(*params.factor.data_as<Real>()) : Real(1);
  const bool needs_sum = params.grad_factor.data != nullptr;
  alignas(64) Real sum[kSums];
  for (int64_t piece = begin; piece < end; ++piece) {
    for (int64_t i = 0; i < kSums; ++i) sum[i] = 0;
    for_each_slice(
        layout, pointers, piece_begin(layout, piece), piece_begin(layout, piece + 1),
        [&](const Slice<T>& slice) { backward_slice(slice, alpha, needs_sum ? sum : nullptr); });
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
