// What a warp and a block share in the FSQ entropy kernels: sums, and one token's distribution.
#pragma once

#include "../core/launch.cuh"
#include "fsq_entropy_math.h"

namespace vtok {
namespace fsq_entropy_cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxBlocks = 0x7fffffff;

// Sum over groups of `width` lanes (a power of two), the same in every lane of a group.
template <typename Value>
__device__ __forceinline__ Value group_sum(Value value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Sum over a block of kThreads, the same in every thread; `scratch` holds kWarps values.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = group_sum(value, 32);
  __syncthreads();  // scratch may still be read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

__device__ __forceinline__ float block_max(float value, float* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float result = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    result = scratch[warp] > result ? scratch[warp] : result;
  }
  return result;
}

// Lanes that work on one channel: the smallest power of two that holds its levels, at most a warp.
inline int lanes_per_channel(const FsqEntropyLayout& layout) {
  int most = 2;
  for (int d = 0; d < layout.channels; ++d) {
    most = layout.channel[d].levels > most ? layout.channel[d].levels : most;
  }
  int width = 2;
  while (width < most && width < 32) width *= 2;
  return width;
}

// What lane `d * width`, for channels in turns of 32 / width, knows of channel d.
struct ChannelMoments {
  float slope, mean, entropy, variance;
  float value;  // z
  int peak;
};

// Computes a token's probabilities, `weight` [level_sum] in shared memory, by one warp; where
// `from_mean` is not null, also level - mean. Calls visit(d, moments) in the first lane of each
// channel's group. All lanes of the warp take part; ends with a __syncwarp.
template <typename T, typename Visit>
__device__ __forceinline__ void assign(const FsqEntropyLayout& layout, int width, const T* z,
                                       int64_t channel_stride, float* weight, float* from_mean,
                                       const Visit& visit) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < layout.channels; first += 32 / width) {
    const int d = first + lane / width;
    const bool exists = d < layout.channels;
    const int levels = exists ? layout.channel[d].levels : 0;
    const int base = exists ? layout.level_offset[d] : 0;
    ChannelMoments m{};
    if (exists) {
      m.value = to_float(z[d * channel_stride]);
      m.peak = fsq_entropy_peak(m.value, layout.channel[d]);
      m.slope = static_cast<float>(layout.slope_per_z[d]) * m.value;
    }
    float sum = 0.0f, moment = 0.0f;
    for (int level = lane % width; level < levels; level += width) {
      const float x = static_cast<float>(level - m.peak);
      const float e = exp_accurate(m.slope * x);
      weight[base + level] = e;
      sum += e;
      moment += e * x;
    }
    sum = group_sum(sum, width);
    m.mean = group_sum(moment, width) / sum;
    float variance = 0.0f;
    for (int level = lane % width; level < levels; level += width) {
      const float p = weight[base + level] / sum;
      const float distance = static_cast<float>(level - m.peak) - m.mean;
      weight[base + level] = p;
      if (from_mean != nullptr) from_mean[base + level] = distance;
      variance += p * (distance * distance);
    }
    m.variance = group_sum(variance, width);
    if (exists && lane % width == 0) {
      m.entropy = log_accurate(sum) - m.slope * m.mean;
      visit(d, m);
    }
  }
  __syncwarp();
}

// quotient and remainder of i by the levels of channel d, for i < 2^24.
__device__ __forceinline__ int take_level(const FsqEntropyLayout& layout, int d, int& rest) {
  const int quotient = static_cast<int>(
      (static_cast<uint64_t>(static_cast<uint32_t>(rest)) * layout.reciprocal[d]) >> 32);
  const int level = rest - quotient * layout.channel[d].levels;
  rest = quotient;
  return level;
}

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  VTOK_CHECK_VALUE(blocks <= kMaxBlocks, "fsq_entropy: too many tokens for one launch, got ",
                   items);
  return static_cast<unsigned>(blocks);
}

// Calls function(TypeTag<T>{}) for the type of z on CUDA.
template <typename Function>
void dispatch_z(const TensorView& z, Function&& function) {
  dispatch_floating_cuda("fsq_entropy", "z", z.dtype, function);
}

}  // namespace fsq_entropy_cuda
}  // namespace vtok
