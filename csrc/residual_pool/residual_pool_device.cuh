// What the forward and the backward kernels of residual_pool share: a block's piece of a frame.
#pragma once

#include "../core/launch.cuh"
#include "residual_pool.h"
#include "residual_pool_math.h"

namespace vtok {

constexpr int kPoolThreads = 256;
constexpr int kPoolWarp = 32;
constexpr int kPoolWarps = kPoolThreads / kPoolWarp;
static_assert(kResidualPoolMaxQueries <= kPoolThreads, "a thread per query");

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int distance = kPoolWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// Places [first, first + count) of frame `number`: blockIdx.x is the frame, blockIdx.y the piece.
template <typename T>
struct ResidualPiece {
  int64_t number, index, first;
  int count;
  float scale;
  const T* frame;         // [N, C] of the frame
  const T* key;           // [N, C] of the clip
  const float* position;  // [N, C]

  __device__ __forceinline__ ResidualPiece(const ResidualPoolLayout& layout, const T* frames,
                                           const T* keys, const float* positions) {
    number = blockIdx.x;
    index = blockIdx.y;
    first = index * kResidualPoolPlaces;
    const int64_t left = layout.places - first;
    count = static_cast<int>(left < kResidualPoolPlaces ? left : kResidualPoolPlaces);
    scale = 1.0f / sqrtf(static_cast<float>(layout.channels));
    frame = frames + frame_offset(layout, number) + first * layout.frame_strides[2];
    key = keys + key_offset(layout, number) + first * layout.key_strides[1];
    position = positions + first * layout.channels;
  }

  // Channel c of z at place `n` of the piece.
  __device__ __forceinline__ float value(const ResidualPoolLayout& layout, int n, int64_t c) const {
    return residual_value(
        to_float(frame[n * layout.frame_strides[2] + c * layout.frame_strides[3]]),
        to_float(key[n * layout.key_strides[1] + c * layout.key_strides[2]]),
        position[n * layout.channels + c]);
  }

  // <rows[q], z> for every q, in all lanes of the calling warp. `rows` is [Q, C].
  __device__ __forceinline__ void products(const ResidualPoolLayout& layout, int n,
                                           const float* rows, float* result) const {
#pragma unroll
    for (int q = 0; q < kResidualPoolMaxQueries; ++q) result[q] = 0.0f;
    for (int64_t c = threadIdx.x % kPoolWarp; c < layout.channels; c += kPoolWarp) {
      const float z = value(layout, n, c);
#pragma unroll
      for (int q = 0; q < kResidualPoolMaxQueries; ++q) {
        if (q < layout.num_queries) result[q] += rows[q * layout.channels + c] * z;
      }
    }
#pragma unroll
    for (int q = 0; q < kResidualPoolMaxQueries; ++q) {
      if (q < layout.num_queries) result[q] = sum_of_warp(result[q]);
    }
  }
};

}  // namespace vtok
