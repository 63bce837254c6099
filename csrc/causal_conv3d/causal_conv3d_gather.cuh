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

}  // namespace vtok
