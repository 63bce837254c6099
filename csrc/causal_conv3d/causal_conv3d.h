// Causal 3-D convolution on CUDA: what the kernels are told. The CPU path is oneDNN through torch,
// see vtok_ext/ops/_causal_conv3d_cpu.py.
//
// Note [Convolution as a matrix product]
//   out[m, n] = sum over k of source[position m, tap and channel k] * weight[n, k]
//   m  output position (b, t, h, w), n  output channel, k = tap * channels + channel
// A is never stored: a block gathers its rows from the source, with zeros outside of it. Forward
// pass, input gradient and upsampling differ in the coordinates that a row and a tap lead to, which
// ConvAxis describes for each axis. The weight's gradient is the product over positions.
#pragma once

#include <cstdint>

#include "../core/stream.h"
#include "../core/tensor_view.h"

namespace vtok {

// Source coordinate of output coordinate q and tap k: floor((q * step + k * tap_step + offset) /
// divisor), in [0, extent). With `exact` a remainder means that there is none (a strided
// convolution's gradient); without, it is one of `divisor` equal neighbours (upsampling).
struct ConvAxis {
  int taps = 1;
  int step = 1;
  int tap_step = 1;
  int offset = 0;
  int divisor = 1;
  int extent = 1;
  int exact = 0;
  int outputs = 1;  // how many q there are
};

// [B, T, H, W, channels] with channel stride 1; the others in elements.
struct ConvStrides {
  int64_t batch = 0;
  int64_t time = 0;
  int64_t row = 0;
  int64_t column = 0;
};

struct ConvSource {
  const void* data = nullptr;
  ConvStrides strides;
  // Coordinates before the first frame: frames of `state` (the last one is -1), else the first
  // frame with `replicate`, else zeros.
  const void* state = nullptr;
  ConvStrides state_strides;
  int state_frames = 0;
  int replicate = 0;
  ConvAxis time, row, column;
  int channels = 0;  // per group
  int groups = 1;
  int depth = 0;  // taps * channels
  int batch = 0;
  int positions = 0;  // batch * outputs of the three axes
  // There is no state, divisors are 1, an axis has at most kConvPlainTaps taps and starts at most
  // kConvPlainBefore frames before a first frame that is repeated, and the source has less than
  // 2^31 elements.
  bool plain = false;
};

constexpr int kConvPlainTaps = 9;
constexpr int kConvPlainBefore = 15;

// y = mix * other + (1 - mix) * silu(sum + bias + residual), mix = sigmoid(*mix_factor)
struct ConvEpilogue {
  const void* bias = nullptr;         // [groups * columns]
  const void* residual = nullptr;     // as out
  const void* other = nullptr;        // as out
  const float* mix_factor = nullptr;  // [1]
  int silu = 0;
  void* preactivation = nullptr;  // as out: sum + bias + residual
  void* out = nullptr;            // [positions, groups * columns], strides below
  ConvStrides strides;
};

enum class ConvMath { kBFloat16, kFloat16, kTf32, kFloat32 };

struct ConvGemm {
  ConvMath math = ConvMath::kFloat32;
  ConvSource source;
  const void* weight = nullptr;  // [groups, columns, depth]
  int columns = 0;               // output channels per group
  ConvEpilogue epilogue;
  int splits = 1;            // of the sum over k; above 1 through `partial`
  float* partial = nullptr;  // [splits, positions, groups * columns]
  int tile = 0;              // index into kConvTiles, then kConvWarpgroupTiles
  bool vectors = false;      // 16-byte loads are aligned
  bool wide = false;         // stores of 16 bytes are aligned
  int device_index = 0;
};

struct ConvWeightGradient {
  ConvMath math = ConvMath::kFloat32;
  ConvSource source;           // of the forward pass
  const void* grad = nullptr;  // [positions, groups * columns]
  int columns = 0;
  void* grad_weight = nullptr;     // [groups * columns, taps, channels] with the strides below
  int64_t weight_strides[3] = {};  // of channel of the output, tap, channel
  void* grad_bias = nullptr;       // [groups * columns] or null
  int splits = 1;                  // of the sum over positions
  float* partial = nullptr;        // [splits, groups * columns, depth + 1]
  int tile = 0;  // index into kConvGradientTiles, then kConvGradientWarpgroupTiles
  bool vectors = false;
  int device_index = 0;
};

void causal_conv3d_gemm_cuda(const ConvGemm& params, Stream stream);
void causal_conv3d_weight_gradient_cuda(const ConvWeightGradient& params, Stream stream);

// How a product of positions x depth by depth x columns is cut up.
struct ConvPlan {
  int tile;
  int splits;
};

ConvPlan causal_conv3d_gemm_plan_cuda(int64_t positions, int64_t columns, int groups, int64_t depth,
                                      ConvMath math, bool may_split, int device_index);
ConvPlan causal_conv3d_weight_gradient_plan_cuda(int64_t positions, int64_t columns, int groups,
                                                 int64_t depth, ConvMath math, int device_index);

// How many splits the weight's gradient takes with a tile.
int causal_conv3d_weight_gradient_splits_cuda(int64_t positions, int64_t columns, int groups,
                                              int64_t depth, int tile, int device_index);

}  // namespace vtok
