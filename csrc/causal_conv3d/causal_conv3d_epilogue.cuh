// What follows the sum of products, in registers: bias, residual, SiLU, blend, rounding, store.
#pragma once

#include "../core/half.h"
#include "../core/launch.cuh"
#include "../core/vectorized.h"
#include "causal_conv3d.h"

namespace vtok {

// Element offset of a position in the output.
__device__ __forceinline__ int64_t conv_output_offset(const ConvSource& source,
                                                      const ConvStrides& strides, int position) {
  const int column = position % source.column.outputs;
  position /= source.column.outputs;
  const int row = position % source.row.outputs;
  position /= source.row.outputs;
  const int time = position % source.time.outputs;
  const int batch = position / source.time.outputs;
  return batch * strides.batch + time * strides.time + row * strides.row + column * strides.column;
}

// sigmoid(mix_factor); 0 without a blend.
__device__ __forceinline__ float conv_mix(const ConvEpilogue& epilogue) {
  return epilogue.mix_factor == nullptr ? 0.0f : sigmoid_accurate(*epilogue.mix_factor);
}

// Finishes `sums` of Width neighbouring channels from `channel` (of all groups), at `offset`
// elements into the output (channel included). All accesses are Width elements wide.
template <typename T, int Width>
__device__ __forceinline__ void conv_finish(const ConvEpilogue& epilogue, float mix, int channel,
                                            int64_t offset, const float (&sums)[Width]) {
  using Word = Vector<T, Width>;
  float values[Width];
#pragma unroll
  for (int i = 0; i < Width; ++i) values[i] = sums[i];
  const auto read = [](const void* data, int64_t at) {
    return load_vector<Word>(static_cast<const T*>(data) + at);
  };
  if (epilogue.bias != nullptr) {
    const Word bias = read(epilogue.bias, channel);
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] += to_float(bias.values[i]);
  }
  if (epilogue.residual != nullptr) {
    const Word residual = read(epilogue.residual, offset);
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] += to_float(residual.values[i]);
  }
  Word word;
  if (epilogue.preactivation != nullptr) {
#pragma unroll
    for (int i = 0; i < Width; ++i) word.values[i] = from_float<T>(values[i]);
    store_vector(static_cast<T*>(epilogue.preactivation) + offset, word);
  }
  if (epilogue.silu) {
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] *= sigmoid_accurate(values[i]);
  }
  if (epilogue.other != nullptr) {
    const Word other = read(epilogue.other, offset);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[i] = values[i] + mix * (to_float(other.values[i]) - values[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < Width; ++i) word.values[i] = from_float<T>(values[i]);
  store_vector(static_cast<T*>(epilogue.out) + offset, word);
}

}  // namespace vtok
