// The convolution's product on Hopper: wgmma on tiles that cp.async gathers.
//
//   a block walks along k in steps of 128 bytes. While the tensor cores work on step s, threads
//   start the copies of step s + stages - 2 into the stage of step s - 2, whose products are done:
//   each warpgroup has waited for its own, and the barrier before step s for the others'.
//
// Results do not depend on the tile, see Note [Bits do not depend on the tile]; but sums inside
// wgmma are not those of mma.sync, so a stream keeps to one of the two.
#pragma once

#include "../core/wgmma.cuh"
#include "causal_conv3d_gemm.cuh"

namespace vtok {

template <int kIndex>
struct ConvWarpgroupTraits {
  static constexpr ConvWarpgroupTile kTile = kConvWarpgroupTiles[kIndex];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kGroupRows = kTile.rows / kTile.warpgroups;
  static constexpr int kWarpRows = kGroupRows / 64;  // products of a warpgroup, below each other
  static constexpr int kWarpColumns = kTile.columns / 8;
  static constexpr int kBlockDistance = 64;
  static constexpr int kRowVectors = 8;
  static constexpr int kRowBytes = kConvVectorBytes * kRowVectors;
  static constexpr int kLines = kThreads / kRowVectors;
  static constexpr int kRowLoads = kTile.rows / kLines;
  static constexpr int kColumnLoads = kTile.columns / kLines;
  static constexpr int kStageBytes = (kTile.rows + kTile.columns) * kRowBytes;
  static constexpr int kSharedBytes = kTile.shared_bytes();
  static_assert(kGroupRows % 64 == 0, "a product has 64 rows");
  static_assert(kTile.rows % kLines == 0 && kTile.columns % kLines == 0, "threads load alike");
  static_assert(kTile.stages >= 3, "one is read, one was read before, one arrives");
  static_assert((kSharedBytes + 1024) * kTile.blocks <= 228 << 10, "shared memory of sm_90");

  // Of vector `vector` in row `line` of a tile, see Note [Operand tiles of wgmma].
  static __device__ __forceinline__ int offset(int line, int vector) {
    return line * kRowBytes + (vector ^ (line & 7)) * kConvVectorBytes;
  }
  static __device__ __forceinline__ int warp_row() {
    const int warp = threadIdx.x / 32;
    return warp / 4 * kGroupRows + warp % 4 * 16;
  }
  static __device__ __forceinline__ int warp_column() { return 0; }
};

// Grid: as causal_conv3d_gemm_kernel. A source that is not plain takes more registers.
template <ConvMath kMath, int kTileIndex, ConvLoads kLoads>
__global__ void __launch_bounds__(ConvWarpgroupTraits<kTileIndex>::kThreads,
                                  kLoads == ConvLoads::kPlain
                                      ? ConvWarpgroupTraits<kTileIndex>::kTile.blocks
                                      : 1) causal_conv3d_warpgroup_kernel(const ConvGemm params) {
#if defined(VTOK_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = typename ConvElement<kMath>::type;
  using Traits = ConvWarpgroupTraits<kTileIndex>;
  using Loader = ConvLoader<T, Traits, kLoads>;
  VTOK_DYNAMIC_SHARED(char, unaligned);
  char* shared = unaligned + (1024 - reinterpret_cast<uintptr_t>(unaligned) % 1024) % 1024;
  const ConvBlock block = conv_block<Traits>(params, Loader::kDepth);
  const int first = block.first_step, last = block.last_step;
  conv_place_rows<Traits>(params, block.first_row, shared);
  Loader loader(params, block.first_row, block.first_column, block.group, first * Loader::kDepth);
  constexpr int kStages = Traits::kTile.stages;
#pragma unroll
  for (int stage = 0; stage < kStages - 2; ++stage) {
    if (first + stage < last) loader.load(shared + stage * Traits::kStageBytes);
    cp_async_commit();
  }
  float sums[Traits::kWarpRows][Traits::kWarpColumns][4] = {};
  const int first_row = threadIdx.x / 128 * Traits::kGroupRows;
  int reading = 0;
  for (int step = first; step < last; ++step) {
    cp_async_wait<kStages - 3>();
    fence_async_proxy();
    __syncthreads();  // this step has arrived, and nobody reads the stage of two steps before
    const char* rows = shared + reading * Traits::kStageBytes;
    const char* columns = rows + Traits::kTile.rows * Traits::kRowBytes;
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) warpgroup_keep(sums[i]);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < Traits::kWarpRows; ++i) {
        warpgroup_multiply<T, Traits::kTile.columns>(
            sums[i], rows + (first_row + i * 64) * Traits::kRowBytes, columns, k);
      }
    }
    warpgroup_commit();
    const int writing = reading < 2 ? reading + kStages - 2 : reading - 2;
    if (step + kStages - 2 < last) loader.load(shared + writing * Traits::kStageBytes);
    cp_async_commit();
    warpgroup_wait<1>();
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) warpgroup_keep(sums[i]);
    reading = reading + 1 == kStages ? 0 : reading + 1;
  }
  warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows; ++i) warpgroup_keep(sums[i]);
  conv_store<T, Traits>(params, block.first_column, block.group, sums, shared);
#endif
}

template <ConvMath kMath, int kTileIndex, ConvLoads kLoads>
void launch_conv_warpgroup(const ConvGemm& params, Stream stream) {
#ifndef VTOK_EMULATE_CUDA
  VTOK_CHECK_VALUE(has_wgmma(params.device_index), "causal_conv3d: tile ", params.tile,
                   " needs a Hopper GPU and a build for sm_90a");
#endif
  using Traits = ConvWarpgroupTraits<kTileIndex>;
  const unsigned blocks = conv_num_blocks(params, Traits::kTile.rows, Traits::kTile.columns);
  VTOK_LAUNCH_SM90((causal_conv3d_warpgroup_kernel<kMath, kTileIndex, kLoads>),
                   dim3(blocks, 1, params.splits), dim3(Traits::kThreads), Traits::kSharedBytes,
                   stream, params);
}

// Sources that are not plain (states of a stream, steps of a strided convolution's gradient) have
// two tiles: fewer kernels.
constexpr int kConvGeneralWarpgroupTile = 2;

// Picks the instantiation for `params.tile`, an index past kConvTiles.
template <ConvMath kMath, int kFirst = 0>
void run_conv_warpgroup_tile(const ConvGemm& params, Stream stream) {
  if constexpr (kFirst < kNumConvWarpgroupTiles) {
    constexpr int kGeneral =
        kConvWarpgroupTiles[kFirst].columns == 64 ? kFirst : kConvGeneralWarpgroupTile;
    if (params.tile != kNumConvTiles + kFirst) {
      return run_conv_warpgroup_tile<kMath, kFirst + 1>(params, stream);
    }
    if (params.source.plain) {
      return launch_conv_warpgroup<kMath, kFirst, ConvLoads::kPlain>(params, stream);
    }
    return launch_conv_warpgroup<kMath, kGeneral, ConvLoads::kGeneral>(params, stream);
  } else {
    VTOK_CHECK_VALUE(false, "causal_conv3d: tile must be one of this format, got ", params.tile);
  }
}

}  // namespace vtok
