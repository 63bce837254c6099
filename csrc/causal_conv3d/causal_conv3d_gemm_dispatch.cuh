// Picks the instantiation of the kernel for a tile; included by one file per format.
#pragma once

#include "causal_conv3d_gemm.cuh"
#include "causal_conv3d_warpgroup.cuh"

namespace vtok {

// Only plain sources have tiles above 128 x 64, and exact float32 none: fewer kernels.
constexpr int kConvFirstSmallTile = 2;

template <ConvMath kMath, ConvLoads kLoads, int kFirst = 0>
void run_conv_tile(const ConvGemm& params, Stream stream) {
  constexpr bool kExists =
      kFirst >= kConvFirstSmallTile || (kLoads == ConvLoads::kPlain && kMath != ConvMath::kFloat32);
  if constexpr (kFirst < kNumConvTiles) {
    if constexpr (kExists) {
      if (params.tile == kFirst) return launch_conv_gemm<kMath, kFirst, kLoads>(params, stream);
    }
    return run_conv_tile<kMath, kLoads, kFirst + 1>(params, stream);
  } else {
    VTOK_CHECK_VALUE(false, "causal_conv3d: tile must be one of this format, got ", params.tile);
  }
}

template <ConvMath kMath>
void run_conv_gemm(const ConvGemm& params, Stream stream) {
  if constexpr (sizeof(typename ConvElement<kMath>::type) == 2) {
    if (params.vectors && params.tile >= kNumConvTiles) {
      return run_conv_warpgroup_tile<kMath>(params, stream);
    }
  }
  if (params.vectors && params.source.plain) {
    return run_conv_tile<kMath, ConvLoads::kPlain>(params, stream);
  }
  ConvGemm small = params;
  if (params.tile < kConvFirstSmallTile || params.tile >= kNumConvTiles) {
    small.tile = kConvFirstSmallTile;
  }
  if (params.vectors) return run_conv_tile<kMath, ConvLoads::kGeneral>(small, stream);
  run_conv_tile<kMath, ConvLoads::kElements>(small, stream);
}

}  // namespace vtok
