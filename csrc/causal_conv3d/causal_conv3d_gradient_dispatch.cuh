// Picks the instantiation of the gradient's kernel; included by one file per format.
#pragma once

#include "causal_conv3d_gradient.cuh"
#include "causal_conv3d_gradient_warpgroup.cuh"

namespace vtok {

// Only plain sources have the large tiles, and exact float32 has not.
template <ConvMath kMath>
void run_conv_weight_gradient(const ConvWeightGradient& params, Stream stream) {
  const bool plain = params.vectors && params.source.plain;
  if constexpr (sizeof(typename ConvElement<kMath>::type) == 2) {
    if (plain && params.tile >= kNumConvGradientTiles) {
#ifndef VTOK_EMULATE_CUDA
      VTOK_CHECK_VALUE(has_wgmma(params.device_index), "causal_conv3d: tile ", params.tile,
                       " needs a Hopper GPU and a build for sm_90a");
#endif
      return run_conv_gradient_warpgroup_tile<kMath>(params, stream);
    }
  }
  if constexpr (kMath != ConvMath::kFloat32) {
    if (plain && params.tile == 0) {
      return launch_conv_weight_gradient<kMath, 0, ConvLoads::kPlain>(params, stream);
    }
  }
  if (plain) return launch_conv_weight_gradient<kMath, 1, ConvLoads::kPlain>(params, stream);
  if (params.vectors) {
    return launch_conv_weight_gradient<kMath, 1, ConvLoads::kGeneral>(params, stream);
  }
  launch_conv_weight_gradient<kMath, 1, ConvLoads::kElements>(params, stream);
}

}  // namespace vtok
