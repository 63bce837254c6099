// Which source frames an output frame depends on, and which output frames a source frame feeds;
// shared by the CPU and the CUDA kernels.
//
//   mean of three   value[t] = (v[2t - p] + v[2t - p + 1] + v[2t - p + 2]) / 3, p padding frames
//   nearest         value[u] = v[u / 2]
//   linear          value[2i] = .25 v[i - 1] + .75 v[i],  value[2i + 1] = .75 v[i] + .25 v[i + 1],
//                   neighbours clamped to the segment of v[i]
//
// Source: VidTok (arXiv 2412.13061), section 3.2, and its release 1.1 for the segments.
#pragma once

#include "../core/quotient.h"
#include "../core/vectorized.h"
#include "temporal_resample.h"

namespace vtok {

// Number and weight of the source frames of one output frame; the first `count` entries count.
template <typename Real>
struct SourceTaps {
  int count;
  int frame[3];
  Real weight[3];
};

template <typename Real>
VTOK_FUNCTION SourceTaps<Real> mean_taps(const ResampleTiming& timing, int t) {
  SourceTaps<Real> taps{0, {0, 0, 0}, {Real(1) / 3, Real(1) / 3, Real(1) / 3}};
  const int first = 2 * t - timing.num_padding;
  // Only the first window can begin in front of v, and only the last one end behind it (in zeros).
  const int begin = first >= 0 || timing.replicate ? first : 0;
  const int end = first + 3 < timing.num_sources ? first + 3 : timing.num_sources;
  taps.count = end - begin;
  for (int k = 0; k < 3; ++k) taps.frame[k] = begin + k > 0 ? begin + k : 0;
  return taps;
}

template <typename Real>
VTOK_FUNCTION SourceTaps<Real> linear_taps(const ResampleTiming& timing, int u) {
  const int i = u / 2;
  const bool is_first_segment = i < timing.segment;
  const int begin = is_first_segment ? 0 : timing.segment;
  const int end =
      is_first_segment && timing.segment < timing.num_sources ? timing.segment : timing.num_sources;
  const int neighbour = u % 2 == 0 ? i - 1 : i + 1;
  if (neighbour < begin || neighbour >= end) return {1, {i, 0, 0}, {Real(1), Real(0), Real(0)}};
  return {2, {i, neighbour, 0}, {Real(0.75), Real(0.25), Real(0)}};
}

// The source frames of output frame `t`.
template <typename Real>
VTOK_FUNCTION SourceTaps<Real> source_taps(const ResampleTiming& timing, int t) {
  if (timing.mode == ResampleMode::kMeanOfThree) return mean_taps<Real>(timing, t);
  const int upsampled = t - timing.num_padding;
  if (upsampled < 0) {
    const int frame = timing.has_front ? -1 - t : 0;
    return {timing.has_front || timing.replicate, {frame, 0, 0}, {Real(1), Real(0), Real(0)}};
  }
  if (timing.mode == ResampleMode::kLinear)
    return linear_taps<Real>(timing, upsampled + timing.skip);
  return {1, {upsampled / 2, 0, 0}, {Real(1), Real(0), Real(0)}};
}

// The weight of source frame `source` in output frame `t`.
template <typename Real>
VTOK_FUNCTION Real source_weight(const ResampleTiming& timing, int t, int source) {
  const SourceTaps<Real> taps = source_taps<Real>(timing, t);
  Real weight = 0;
  for (int k = 0; k < 3; ++k) {
    if (k < taps.count && taps.frame[k] == source) weight += taps.weight[k];
  }
  return weight;
}

// Output frames [first, last] hold every one that depends on `source`; possibly none, and some in
// between may not.
struct OutputRange {
  int first, last;
};

VTOK_FUNCTION OutputRange output_range(const ResampleTiming& timing, int source) {
  if (source < 0) return {-1 - source, -1 - source};
  OutputRange range{0, 0};
  if (timing.mode == ResampleMode::kMeanOfThree) {
    range = {(source + timing.num_padding - 1) / 2, (source + timing.num_padding) / 2};
  } else {
    const int reach = timing.mode == ResampleMode::kLinear ? 1 : 0;
    const int shift = timing.num_padding - timing.skip;
    range = {2 * source - reach + shift, 2 * source + 1 + reach + shift};
  }
  if (source == 0 && timing.replicate) range.first = 0;
  if (range.first < 0) range.first = 0;
  if (range.last >= timing.num_outputs) range.last = timing.num_outputs - 1;
  return range;
}

struct ResampleOffsets {
  int64_t of[kNumResampleTensors];
};

// Element offsets of pixel `pixel`, at frame 0, in the tensors [kFirst, kEnd).
template <int kFirst = 0, int kEnd = kNumResampleTensors>
VTOK_FUNCTION ResampleOffsets pixel_offsets(const ResampleLayout& layout, int64_t pixel) {
  ResampleOffsets offsets{};
  int64_t rest = quotient_of(pixel, layout.run.size);
  const int64_t column = pixel - rest * layout.run.size;
  for (int tensor = kFirst; tensor < kEnd; ++tensor) {
    offsets.of[tensor] = column * layout.run.strides[tensor];
  }
  for (int dim = kResampleMaxDims - 1; dim >= 0; --dim) {  // a constant count: nvcc unrolls it
    if (dim >= layout.num_outer) continue;
    const ResampleDim& outer = layout.outer[dim];
    const int64_t next = dim == 0 ? 0 : quotient_of(rest, outer.size);
    const int64_t position = rest - next * outer.size;
    rest = next;
    for (int tensor = kFirst; tensor < kEnd; ++tensor) {
      offsets.of[tensor] += position * outer.strides[tensor];
    }
  }
  return offsets;
}

// Where a source frame lies: in x, carried or front (or their gradients, as `first` says).
struct SourceFrame {
  ResampleTensor tensor;
  int64_t offset;  // of its frame in that tensor
};

// Every branch names its tensor: its stride, and what a caller selects by it, is no array access.
VTOK_FUNCTION SourceFrame source_frame(const ResampleLayout& layout, int source, bool is_gradient) {
  const int shift = is_gradient ? kResampleGradX - kResampleX : 0;
  const auto frame_of = [&](ResampleTensor tensor, int64_t frame) {
    return SourceFrame{static_cast<ResampleTensor>(tensor + shift),
                       frame * layout.frame_strides[tensor + shift]};
  };
  const int frame = source - layout.timing.num_carried;
  if (frame >= 0) return frame_of(kResampleX, frame);
  return source >= 0 ? frame_of(kResampleCarried, source) : frame_of(kResampleFront, -1 - source);
}

}  // namespace vtok
