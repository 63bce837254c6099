// The weight's gradient on Hopper: wgmma on transposed operands.
//
//   Both operands lie in shared memory as they lie in global memory, a row per position, in blocks
//   of 64 channels; wgmma transposes them. The pipeline is that of causal_conv3d_warpgroup.cuh,
//   along the positions. Sources are plain.
#pragma once

#include "../core/wgmma.cuh"
#include "causal_conv3d_gradient.cuh"

namespace vtok {

template <int kIndex>
struct ConvGradientWarpgroupTraits {
  static constexpr ConvWarpgroupTile kTile = kConvGradientWarpgroupTiles[kIndex];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStep = 64;  // positions
  static constexpr int kWidth = 8;  // elements of a vector
  static constexpr int kRowBytes = 128;
  static constexpr int kBlockBytes = kStep * kRowBytes;  // 64 channels of all positions
  static constexpr int kRowBlocks = kTile.rows / 64;
  static constexpr int kColumnBlocks = kTile.columns / 64;
  static constexpr int kStageBytes = (kRowBlocks + kColumnBlocks) * kBlockBytes;
  static constexpr int kLines = kThreads / 8;  // positions loaded at a time
  static constexpr int kLoads = kStep / kLines;
  static constexpr int kWarpRows = 1;
  static constexpr int kWarpColumns = kTile.columns / 8;
  static constexpr int kBlockDistance = 64;
  static constexpr int kSharedBytes = kTile.shared_bytes();
  static_assert(kTile.rows == 64 * kTile.warpgroups, "a warpgroup has 64 rows");
  static_assert(kLines % 8 == 0 && kThreads >= kTile.rows, "one swizzle; a bias per thread");
  static_assert(kTile.stages >= 3, "one is read, one was read before, one arrives");
  static_assert((kSharedBytes + 1024) * kTile.blocks <= 228 << 10, "shared memory of sm_90");

  // Of vector `vector` of position `line` in a block.
  static __device__ __forceinline__ int offset(int line, int vector) {
    return line * kRowBytes + (vector ^ (line & 7)) * kConvVectorBytes;
  }
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 * 16;
  }
  static __device__ __forceinline__ int warp_column() { return 0; }
};

// Loads one thread's share: vector `vector_` of every block of kLoads positions.
template <typename T, typename Traits>
class ConvGradientWarpgroupLoader {
 public:
  __device__ __forceinline__ ConvGradientWarpgroupLoader(const ConvWeightGradient& params,
                                                         const ConvBlock& block)
      : params_(params),
        line_(threadIdx.x / 8),
        row_(block.first_row + threadIdx.x % 8 * Traits::kWidth),
        position_(block.first_step * Traits::kStep + line_),
        grad_stride_(int64_t{params.source.groups} * params.columns),
        step_(params.source, Traits::kStep) {
    const int vector = threadIdx.x % 8;
    to_ = Traits::offset(line_, vector);
    grad_ = static_cast<const T*>(params.grad) + int64_t{block.group} * params.columns + row_ +
            position_ * grad_stride_;
    source_ =
        static_cast<const T*>(params.source.data) + int64_t{block.group} * params.source.channels;
#pragma unroll
    for (int b = 0; b < Traits::kColumnBlocks; ++b) {
      taps_[b].set(params.source,
                   conv_tap(params.source, block.first_column + b * 64 + vector * Traits::kWidth));
    }
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      positions_[i] = {0, 0, 0, 0};
      ConvPositionStep(params.source, position_ + i * Traits::kLines)
          .move(params.source, positions_[i]);
    }
  }

  // Starts loading the next step.
  __device__ __forceinline__ void load(char* stage) {
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      char* const to = stage + to_ + i * Traits::kLines * Traits::kRowBytes;
      const bool valid = position_ + i * Traits::kLines < params_.source.positions;
      const T* from = grad_ + int64_t{i * Traits::kLines} * grad_stride_;
#pragma unroll
      for (int b = 0; b < Traits::kRowBlocks; ++b) {
        cp_async<kConvVectorBytes>(to + b * Traits::kBlockBytes, from + b * 64,
                                   valid && row_ + b * 64 < params_.columns);
      }
      const ConvPlainOrigin origin(params_.source, positions_[i]);
#pragma unroll
      for (int b = 0; b < Traits::kColumnBlocks; ++b) {
        bool inside = valid;
        const int32_t offset = taps_[b].offset(params_.source, origin, inside);
        cp_async<kConvVectorBytes>(to + (Traits::kRowBlocks + b) * Traits::kBlockBytes,
                                   source_ + offset, inside);
      }
      step_.move(params_.source, positions_[i]);
    }
    position_ += Traits::kStep;
    grad_ += Traits::kStep * grad_stride_;
  }

 private:
  const ConvWeightGradient& params_;
  int line_, row_, position_;
  int to_;  // byte offset of the first line in a block
  int64_t grad_stride_;
  ConvPositionStep step_;
  const T* grad_;  // of the first line, at row_
  const T* source_;
  ConvPlainTap taps_[Traits::kColumnBlocks];
  ConvPosition positions_[Traits::kLoads];
};

// Grid: as causal_conv3d_weight_gradient_kernel.
template <ConvMath kMath, int kTileIndex>
__global__ void __launch_bounds__(ConvGradientWarpgroupTraits<kTileIndex>::kThreads,
                                  ConvGradientWarpgroupTraits<kTileIndex>::kTile.blocks)
    causal_conv3d_weight_gradient_warpgroup_kernel(const ConvWeightGradient params) {
#if defined(VTOK_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = typename ConvElement<kMath>::type;
  using Traits = ConvGradientWarpgroupTraits<kTileIndex>;
  VTOK_DYNAMIC_SHARED(char, unaligned);
  char* shared = unaligned + (1024 - reinterpret_cast<uintptr_t>(unaligned) % 1024) % 1024;
  const ConvBlock block = conv_gradient_block<Traits>(params);
  const int first = block.first_step, last = block.last_step;
  ConvGradientWarpgroupLoader<T, Traits> loader(params, block);
  constexpr int kStages = Traits::kTile.stages;
#pragma unroll
  for (int stage = 0; stage < kStages - 2; ++stage) {
    if (first + stage < last) loader.load(shared + stage * Traits::kStageBytes);
    cp_async_commit();
  }
  float sums[1][Traits::kWarpColumns][4] = {};
  float bias = 0.0f;
  const bool sums_bias = block.first_column == 0 && threadIdx.x < Traits::kTile.rows;
  const int own_block = threadIdx.x / 128;  // of a's columns
  int reading = 0;
  for (int step = first; step < last; ++step) {
    cp_async_wait<kStages - 3>();
    fence_async_proxy();
    __syncthreads();  // this step has arrived, and nobody reads the stage of two steps before
    const char* stage = shared + reading * Traits::kStageBytes;
    warpgroup_keep(sums[0]);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      warpgroup_multiply_transposed<T, Traits::kTile.columns>(
          sums[0], stage + own_block * Traits::kBlockBytes,
          stage + Traits::kRowBlocks * Traits::kBlockBytes, k);
    }
    warpgroup_commit();
    const int writing = reading < 2 ? reading + kStages - 2 : reading - 2;
    if (step + kStages - 2 < last) loader.load(shared + writing * Traits::kStageBytes);
    cp_async_commit();
    if (sums_bias) {
      const char* channel = stage + threadIdx.x / 64 * Traits::kBlockBytes;
#pragma unroll 4
      for (int line = 0; line < Traits::kStep; ++line) {
        const int at = Traits::offset(line, threadIdx.x % 64 / 8) + threadIdx.x % 8 * sizeof(T);
        bias += to_float(load_vector<Vector<T, 1>>(channel + at).values[0]);
      }
    }
    warpgroup_wait<1>();
    warpgroup_keep(sums[0]);
    reading = reading + 1 == kStages ? 0 : reading + 1;
  }
  warpgroup_wait<0>();
  warpgroup_keep(sums[0]);
  cp_async_wait_all();
  conv_gradient_store<Traits>(params, block, bias, sums);
#endif
}

// Picks the instantiation for `params.tile`, an index past kConvGradientTiles.
template <ConvMath kMath, int kFirst = 0>
void run_conv_gradient_warpgroup_tile(const ConvWeightGradient& params, Stream stream) {
  if constexpr (kFirst < kNumConvGradientWarpgroupTiles) {
    if (params.tile != kNumConvGradientTiles + kFirst) {
      return run_conv_gradient_warpgroup_tile<kMath, kFirst + 1>(params, stream);
    }
    using Traits = ConvGradientWarpgroupTraits<kFirst>;
    const unsigned blocks =
        conv_gradient_num_blocks(params, Traits::kTile.rows, Traits::kTile.columns);
    VTOK_LAUNCH_SM90((causal_conv3d_weight_gradient_warpgroup_kernel<kMath, kFirst>),
                     dim3(blocks, 1, params.splits), dim3(Traits::kThreads), Traits::kSharedBytes,
                     stream, params);
  } else {
    VTOK_CHECK_VALUE(false, "causal_conv3d: tile must be one of this format, got ", params.tile);
  }
}

}  // namespace vtok
