// Host side of the weight's gradient: choice of tile and splits, format, sums of partial sums.
#include "../core/half.h"
#include "../core/launch.cuh"
#include "causal_conv3d_gradient.cuh"

namespace vtok {

extern template void run_conv_weight_gradient<ConvMath::kBFloat16>(const ConvWeightGradient&,
                                                                   Stream);
extern template void run_conv_weight_gradient<ConvMath::kFloat16>(const ConvWeightGradient&,
                                                                  Stream);
extern template void run_conv_weight_gradient<ConvMath::kTf32>(const ConvWeightGradient&, Stream);
extern template void run_conv_weight_gradient<ConvMath::kFloat32>(const ConvWeightGradient&,
                                                                  Stream);

namespace {

constexpr int kThreads = 256;
// Positions that one split sums at most: the rounding errors of a longer float32 sum would show.
constexpr int64_t kMostPositions = 32768;
constexpr int64_t kLeastPositions = 256;  // less is all start-up
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;

// Adds the partial sums in the order of positions.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    causal_conv3d_gradient_sum_kernel(const ConvWeightGradient params) {
  const int64_t width = params.source.depth + 1;
  const int64_t count = int64_t{params.source.groups} * params.columns * width;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    float sum = 0.0f;
    for (int split = 0; split < params.splits; ++split) sum += params.partial[split * count + i];
    const int64_t channel = i / width;
    const int64_t place = i % width;
    if (place == params.source.depth) {
      if (params.grad_bias != nullptr) {
        static_cast<T*>(params.grad_bias)[channel] = from_float<T>(sum);
      }
      continue;
    }
    const int64_t tap = place / params.source.channels;
    const int64_t input = place % params.source.channels;
    const int64_t at = channel * params.weight_strides[0] + tap * params.weight_strides[1] +
                       input * params.weight_strides[2];
    static_cast<T*>(params.grad_weight)[at] = from_float<T>(sum);
  }
}

template <ConvMath kMath>
void run(const ConvWeightGradient& params, Stream stream) {
  run_conv_weight_gradient<kMath>(params, stream);
  using T = typename ConvElement<kMath>::type;
  const int64_t count = int64_t{params.source.groups} * params.columns * (params.source.depth + 1);
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  VTOK_LAUNCH((causal_conv3d_gradient_sum_kernel<T>),
              dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kThreads), 0,
              stream, params);
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

ConvPlan causal_conv3d_weight_gradient_plan_cuda(int64_t positions, int64_t columns, int groups,
                                                 int64_t depth, ConvMath math, int device_index) {
  // The large tile loads half as much per product; it needs as many channels to be full.
  int tile = math != ConvMath::kFloat32 && columns > 64 && depth > 64 ? 0 : 1;
  const bool is_half = math == ConvMath::kBFloat16 || math == ConvMath::kFloat16;
  if (kConvGradientWarpgroupsMeasured && is_half && has_wgmma(device_index)) {
    tile = kNumConvGradientTiles + (columns <= 64 ? 2 : depth <= 128 ? 1 : 0);
  }
  return {tile, causal_conv3d_weight_gradient_splits_cuda(positions, columns, groups, depth, tile,
                                                          device_index)};
}

int causal_conv3d_weight_gradient_splits_cuda(int64_t positions, int64_t columns, int groups,
                                              int64_t depth, int tile, int device_index) {
  const int multiprocessors = num_multiprocessors(device_index);
  const int64_t blocks = ceil_div(columns, conv_gradient_tile_rows(tile)) *
                         ceil_div(depth, conv_gradient_tile_columns(tile)) * groups;
  const int64_t partial_bytes = columns * groups * (depth + 1) * 4;
  int64_t splits = 4 * multiprocessors / blocks;
  const int64_t most = positions / kLeastPositions;
  if (splits > most) splits = most;
  if (splits < ceil_div(positions, kMostPositions)) splits = ceil_div(positions, kMostPositions);
  if (splits > kMostPartialBytes / partial_bytes) splits = kMostPartialBytes / partial_bytes;
  return static_cast<int>(splits < 1 ? 1 : splits);
}

void causal_conv3d_weight_gradient_cuda(const ConvWeightGradient& params, Stream stream) {
  const DeviceGuard guard(params.device_index);
  switch (params.math) {
    case ConvMath::kBFloat16: return run<ConvMath::kBFloat16>(params, stream);
    case ConvMath::kFloat16: return run<ConvMath::kFloat16>(params, stream);
    case ConvMath::kTf32: return run<ConvMath::kTf32>(params, stream);
    case ConvMath::kFloat32: return run<ConvMath::kFloat32>(params, stream);
  }
}

}  // namespace vtok
