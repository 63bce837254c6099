// Picks the instantiation of the kernel for a tile; included by one file per format.
#pragma once

#include "causal_conv3d_gemm.cuh"
#include "causal_conv3d_warpgroup.cuh"

namespace vtok {

template <ConvMath kMath, bool kVectors, int kFirst = 0>
void run_conv_tile(const ConvGemm& params, Stream stream) {
  // Unaligned loads are slow anyway and exact float32 has no tile above 128 x 64: fewer kernels.
  constexpr bool kExists = kMath == ConvMath::kFloat32 ? kFirst >= 2 : (kVectors || kFirst >= 2);
  if constexpr (kFirst < kNumConvTiles) {
    if constexpr (kExists) {
      if (params.tile == kFirst) {
        return launch_conv_gemm<kMath, kFirst, kVectors>(params, stream);
      }
    }
    return run_conv_tile<kMath, kVectors, kFirst + 1>(params, stream);
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
  if (params.vectors) return run_conv_tile<kMath, true>(params, stream);
  ConvGemm unaligned = params;
  const bool is_large = params.tile < 2 || params.tile >= kNumConvTiles;
  unaligned.tile = is_large ? 2 : params.tile;
  run_conv_tile<kMath, false>(unaligned, stream);
}

}  // namespace vtok
