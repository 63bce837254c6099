// Clamped per-token entropy on CUDA, streamed over the codebook in tiles.
//
// A block owns a token, a thread combinations of one half ("own"), and tiles of the other half pass
// through shared memory, where all threads read the same element (a broadcast). A warp whose
// products with a tile are all below the clamp takes the tile's sum instead: the usual, confident
// token costs little more than reading its factors. No atomics: every sum has a fixed order.
#include "../core/dispatch.h"
#include "fsq_entropy.h"
#include "fsq_entropy_warp.cuh"

namespace vtok {
namespace {

using namespace fsq_entropy_cuda;

constexpr int kTile = kThreads;  // a thread stages one element

// A tile of the other half.
struct Tile {
  float* weight;      // [kTile]
  float* log_weight;  // [kTile]
  int count;
  float peak, sum;
};

__device__ __forceinline__ void stage(Tile& tile, const float* __restrict__ other, int first,
                                      int size, float* scratch) {
  const int i = first + static_cast<int>(threadIdx.x);
  const float value = i < size ? other[i] : 0.0f;
  tile.count = size - first < kTile ? size - first : kTile;
  tile.weight[threadIdx.x] = value;
  tile.log_weight[threadIdx.x] = fsq_entropy_log_factor(value);
  tile.peak = block_max(value, scratch);
  tile.sum = block_sum(value, scratch);  // its barriers publish the tile
}

// Sum over the tile of weight * ln max(p, clamp), or of weight * (ln max(p, clamp) + [p >= clamp]).
template <bool kSlope>
__device__ __forceinline__ float stream(const Tile& tile, float own, float log_own) {
  constexpr float kLogClamp = static_cast<float>(kFsqEntropyLogClamp);
  if (!(own * tile.peak >= static_cast<float>(kFsqEntropyClamp))) return kLogClamp * tile.sum;
  float sum = 0.0f;
  for (int k = 0; k < tile.count; ++k) {
    const float log_p = log_own + tile.log_weight[k];
    if constexpr (kSlope) {
      sum += tile.weight[k] * (log_p >= kLogClamp ? log_p + 1.0f : kLogClamp);
    } else {
      sum += tile.weight[k] * (log_p > kLogClamp ? log_p : kLogClamp);
    }
  }
  return sum;
}

// out = entropy [codebooks, tokens], or grad_own [codebooks, tokens, own_size] where kSlope.
template <bool kSlope>
__global__ void __launch_bounds__(kThreads)
    fsq_entropy_clamped_kernel(const int64_t num_tokens,
                               const float* __restrict__ own_half,  // [codebooks, tokens, own_size]
                               const FsqEntropyStrides own_strides, const int own_size,
                               const float* __restrict__ other_half,  // [.., tokens, other_size]
                               const FsqEntropyStrides other_strides, const int other_size,
                               const float* __restrict__ grad_entropy,  // [], where kSlope
                               float* __restrict__ out, const FsqEntropyStrides out_strides) {
  VTOK_SHARED(float, weight, kTile);
  VTOK_SHARED(float, log_weight, kTile);
  VTOK_SHARED(float, scratch, kWarps);
  const int64_t codebook = blockIdx.x / num_tokens, token = blockIdx.x % num_tokens;
  const float* own_row = own_half + codebook * own_strides.codebook + token * own_strides.token;
  const float* other_row =
      other_half + codebook * other_strides.codebook + token * other_strides.token;
  float* out_row = out + codebook * out_strides.codebook + token * out_strides.token;
  Tile tile{weight, log_weight, 0, 0.0f, 0.0f};
  float entropy = 0.0f;
  for (int begin = 0; begin < own_size; begin += kThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    const float own = i < own_size ? own_row[i] : 0.0f;
    const float log_own = fsq_entropy_log_factor(own);
    float sum = 0.0f;
    for (int first = 0; first < other_size; first += kTile) {
      __syncthreads();  // the tile before may still be read
      stage(tile, other_row, first, other_size, scratch);
      sum += stream<kSlope>(tile, own, log_own);
    }
    if constexpr (kSlope) {
      if (i < own_size) out_row[i] = -*grad_entropy * sum;
    } else {
      entropy -= own * sum;
    }
  }
  if constexpr (!kSlope) {
    entropy = block_sum(entropy, scratch);
    if (threadIdx.x == 0) *out_row = entropy;
  }
}

}  // namespace

void fsq_entropy_clamped_forward_cuda(const FsqEntropyClampedForward& params, Stream stream) {
  const DeviceGuard device(params.low.device_index);
  VTOK_LAUNCH((fsq_entropy_clamped_kernel<false>),
              dim3(blocks_for(params.num_codebooks * params.num_tokens, 1)), dim3(kThreads), 0,
              stream, params.num_tokens, params.low.data_as<float>(),
              fsq_entropy_strides(params.low), params.low_size, params.high.data_as<float>(),
              fsq_entropy_strides(params.high), params.high_size, nullptr,
              params.entropy.data_as<float>(), fsq_entropy_strides(params.entropy));
}

void fsq_entropy_clamped_backward_cuda(const FsqEntropyClampedBackward& params, Stream stream) {
  const DeviceGuard device(params.low.device_index);
  const dim3 blocks(blocks_for(params.num_codebooks * params.num_tokens, 1));
  const float* low = params.low.data_as<float>();
  const float* high = params.high.data_as<float>();
  const float* grad = params.grad_entropy.data_as<float>();
  const FsqEntropyStrides low_strides = fsq_entropy_strides(params.low);
  const FsqEntropyStrides high_strides = fsq_entropy_strides(params.high);
  VTOK_LAUNCH((fsq_entropy_clamped_kernel<true>), blocks, dim3(kThreads), 0, stream,
              params.num_tokens, low, low_strides, params.low_size, high, high_strides,
              params.high_size, grad, params.grad_low.data_as<float>(),
              fsq_entropy_strides(params.grad_low));
  VTOK_LAUNCH((fsq_entropy_clamped_kernel<true>), blocks, dim3(kThreads), 0, stream,
              params.num_tokens, high, high_strides, params.high_size, low, low_strides,
              params.low_size, grad, params.grad_high.data_as<float>(),
              fsq_entropy_strides(params.grad_high));
}

}  // namespace vtok
