// Where a row and a tap of the matrix product lie in the source, see Note [Convolution as a matrix
// product] in causal_conv3d.h.
#pragma once

#include "../core/launch.cuh"
#include "causal_conv3d.h"

namespace vtok {

// The source coordinate of `numerator`, or -1 where there is none. `is_before` tells coordinates
// before 0, which have a meaning on the time axis.
__device__ __forceinline__ int conv_coordinate(const ConvAxis& axis, int numerator) {
  if (numerator < 0) return -1;
  int coordinate = numerator;
  if (axis.divisor > 1) {
    coordinate = numerator / axis.divisor;
    if (axis.exact && coordinate * axis.divisor != numerator) return -1;
  }
  return coordinate < axis.extent ? coordinate : -1;
}

// A position of the output: its batch item and its coordinates times step, plus offset.
struct ConvRow {
  int batch;  // -1: no position
  int time, row, column;
};

__device__ __forceinline__ ConvRow conv_row(const ConvSource& source, int position) {
  if (position >= source.positions) return {-1, 0, 0, 0};
  const int column = position % source.column.outputs;
  position /= source.column.outputs;
  const int row = position % source.row.outputs;
  position /= source.row.outputs;
  const int time = position % source.time.outputs;
  return {position / source.time.outputs, time * source.time.step + source.time.offset,
          row * source.row.step + source.row.offset,
          column * source.column.step + source.column.offset};
}

// A place in the depth of the product: a tap (time, row, column) and a channel.
struct ConvTap {
  int time, row, column, channel;
};

__device__ __forceinline__ ConvTap conv_tap(const ConvSource& source, int k) {
  ConvTap tap;
  tap.channel = k % source.channels;
  k /= source.channels;
  tap.column = k % source.column.taps;
  k /= source.column.taps;
  tap.row = k % source.row.taps;
  tap.time = k / source.row.taps;  // at or beyond time.taps: beyond the depth
  return tap;
}

// Moves `count` channels on; true when that led to another tap.
__device__ __forceinline__ bool conv_advance(const ConvSource& source, ConvTap& tap, int count) {
  tap.channel += count;
  if (tap.channel < source.channels) return false;
  do {
    tap.channel -= source.channels;
    if (++tap.column == source.column.taps) {
      tap.column = 0;
      if (++tap.row == source.row.taps) {
        tap.row = 0;
        ++tap.time;
      }
    }
  } while (tap.channel >= source.channels);
  return true;
}

// Channel 0 of the group at the tap of a row, or null where the source holds zeros.
template <typename T>
__device__ __forceinline__ const T* conv_locate(const ConvSource& source, const ConvRow& at,
                                                const ConvTap& tap) {
  if (at.batch < 0 || tap.time >= source.time.taps) return nullptr;
  const int row = conv_coordinate(source.row, at.row + tap.row * source.row.tap_step);
  const int column =
      conv_coordinate(source.column, at.column + tap.column * source.column.tap_step);
  if (row < 0 || column < 0) return nullptr;
  const int numerator = at.time + tap.time * source.time.tap_step;
  int time = conv_coordinate(source.time, numerator);
  if (time < 0) {
    if (numerator >= 0) return nullptr;
    if (source.state_frames > 0) {
      const ConvStrides& s = source.state_strides;
      return static_cast<const T*>(source.state) + at.batch * s.batch +
             int64_t{source.state_frames + numerator} * s.time + row * s.row + column * s.column;
    }
    if (!source.replicate) return nullptr;
    time = 0;
  }
  const ConvStrides& s = source.strides;
  return static_cast<const T*>(source.data) + at.batch * s.batch + time * s.time + row * s.row +
         column * s.column;
}

// The rows of a thread whose values it loads, for any source.
template <typename T, int kCount>
class ConvGeneralRows {
 public:
  __device__ __forceinline__ void place(const ConvSource& source, int i, int position) {
    rows_[i] = conv_row(source, position);
  }
  __device__ __forceinline__ void start(const ConvSource& source, int group) {
    group_offset_ = int64_t{group} * source.channels;
  }
  // Channel 0 of the group at a tap of row i, or null where there are zeros.
  __device__ __forceinline__ const T* locate(const ConvSource& source, int i,
                                             const ConvTap& tap) const {
    const T* found = conv_locate<T>(source, rows_[i], tap);
    return found == nullptr ? nullptr : found + group_offset_;
  }
  // Makes `tap` the one that is_valid and at speak of.
  __device__ __forceinline__ void move(const ConvSource& source, const ConvTap& tap) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sources_[i] = locate(source, i, tap);
  }
  __device__ __forceinline__ bool is_valid(int i) const { return sources_[i] != nullptr; }
  __device__ __forceinline__ const T* at(int i, int channel) const { return sources_[i] + channel; }

 private:
  int64_t group_offset_;
  ConvRow rows_[kCount];
  const T* sources_[kCount];
};

// The same for a plain source, where a tap is the same distance from every row, but for the frames
// before the first one: to move to another tap is a few instructions. A mask has a bit for each tap
// of each axis, whether it lies in the source, and then how many frames before the first one tap 0
// is where that one is repeated. Offsets count elements and wrap; that of a valid value is below
// 2^31.
template <typename T, int kCount>
class ConvPlainRows {
 public:
  __device__ __forceinline__ void place(const ConvSource& source, int i, int position) {
    const ConvRow row = conv_row(source, position);
    const ConvStrides& s = source.strides;
    bases_[i] = static_cast<uint32_t>(row.batch) * static_cast<uint32_t>(s.batch) +
                static_cast<uint32_t>(row.time) * static_cast<uint32_t>(s.time) +
                static_cast<uint32_t>(row.row) * static_cast<uint32_t>(s.row) +
                static_cast<uint32_t>(row.column) * static_cast<uint32_t>(s.column);
    masks_[i] = 0;
    if (row.batch < 0) return;
    const int before = source.replicate && row.time < 0 ? -row.time : 0;
    masks_[i] = taps_inside(source.time, row.time, source.replicate) |
                taps_inside(source.row, row.row, false) << kConvPlainTaps |
                taps_inside(source.column, row.column, false) << 2 * kConvPlainTaps |
                static_cast<uint32_t>(before) << 3 * kConvPlainTaps;
  }
  __device__ __forceinline__ void start(const ConvSource& source, int group) {
    data_ = static_cast<const T*>(source.data) + int64_t{group} * source.channels;
  }
  __device__ __forceinline__ void move(const ConvSource& source, const ConvTap& tap) {
    const ConvStrides& s = source.strides;
    offset_ =
        static_cast<uint32_t>(tap.time * source.time.tap_step) * static_cast<uint32_t>(s.time) +
        static_cast<uint32_t>(tap.row * source.row.tap_step) * static_cast<uint32_t>(s.row) +
        static_cast<uint32_t>(tap.column * source.column.tap_step) *
            static_cast<uint32_t>(s.column);
    time_ = source.replicate ? tap.time * source.time.tap_step : 0;
    frame_ = static_cast<uint32_t>(s.time);
    // Beyond the depth: a bit that no mask has.
    bits_ = tap.time >= source.time.taps ? 1u << 31
                                         : 1u << tap.time | 1u << (kConvPlainTaps + tap.row) |
                                               1u << (2 * kConvPlainTaps + tap.column);
  }
  __device__ __forceinline__ bool is_valid(int i) const { return (masks_[i] & bits_) == bits_; }
  __device__ __forceinline__ const T* at(int i, int channel) const {
    const int before = static_cast<int>(masks_[i] >> 3 * kConvPlainTaps) - time_;
    const uint32_t repeated = before > 0 ? static_cast<uint32_t>(before) * frame_ : 0;
    return data_ +
           static_cast<int32_t>(bases_[i] + repeated + (offset_ + static_cast<uint32_t>(channel)));
  }

 private:
  static __device__ __forceinline__ uint32_t taps_inside(const ConvAxis& axis, int first,
                                                         bool before_too) {
    uint32_t bits = 0;
    for (int tap = 0; tap < axis.taps; ++tap) {
      const int coordinate = first + tap * axis.tap_step;
      if ((coordinate >= 0 || before_too) && coordinate < axis.extent) bits |= 1u << tap;
    }
    return bits;
  }

  const T* data_;
  uint32_t bases_[kCount], masks_[kCount];
  uint32_t offset_, bits_;  // of the tap
  int time_;                // of the tap, in frames from tap 0; 0 where none is repeated
  uint32_t frame_;          // distance of frames
};

}  // namespace vtok
