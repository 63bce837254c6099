// Host side of the convolution on CUDA: choice of tile and splits, format, sums of partial sums.
#include "../core/launch.cuh"
#include "causal_conv3d_gemm.cuh"

namespace vtok {
namespace {

constexpr int kThreads = 256;
// A split walks at least so many steps of 64 bytes: less is all start-up.
constexpr int kLeastSteps = 8;
constexpr int kMostSplits = 16;

// Adds the partial sums in the order of k and finishes them.
template <typename T>
__global__ void __launch_bounds__(kThreads) causal_conv3d_split_kernel(const ConvGemm params) {
  const int64_t columns = int64_t{params.source.groups} * params.columns;
  const int64_t count = params.source.positions * columns;
  const float mix = conv_mix(params.epilogue);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    float sum = 0.0f;
    for (int split = 0; split < params.splits; ++split) sum += params.partial[split * count + i];
    const int position = static_cast<int>(i / columns);
    const int channel = static_cast<int>(i % columns);
    const int64_t at =
        conv_output_offset(params.source, params.epilogue.strides, position) + channel;
    conv_finish<T>(params.epilogue, mix, channel, at, {sum});
  }
}

template <ConvMath kMath>
void run(const ConvGemm& params, Stream stream) {
  run_conv_gemm<kMath>(params, stream);
  if (params.splits == 1) return;
  using T = typename ConvElement<kMath>::type;
  const int64_t count = int64_t{params.source.positions} * params.source.groups * params.columns;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  VTOK_LAUNCH((causal_conv3d_split_kernel<T>),
              dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kThreads), 0,
              stream, params);
}

int element_bytes(ConvMath math) {
  return math == ConvMath::kBFloat16 || math == ConvMath::kFloat16 ? 2 : 4;
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// As many splits as fill two waves of blocks, each with work enough.
int choose_splits(int64_t blocks, int64_t steps, int multiprocessors) {
  const int64_t wanted = 2 * multiprocessors / (blocks > 0 ? blocks : 1);
  const int64_t most = steps / kLeastSteps;
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int>(splits < 1 ? 1 : splits > kMostSplits ? kMostSplits : splits);
}

}  // namespace

ConvPlan causal_conv3d_gemm_plan_cuda(int64_t positions, int64_t columns, int groups, int64_t depth,
                                      ConvMath math, bool may_split, int device_index) {
  const int multiprocessors = num_multiprocessors(device_index);
  const bool has_warpgroups = element_bytes(math) == 2 && has_wgmma(device_index);
  const int tile = choose_conv_tile(positions, columns, groups, multiprocessors,
                                    math == ConvMath::kFloat32, has_warpgroups);
  const int64_t blocks = ceil_div(positions, conv_tile_rows(tile)) *
                         ceil_div(columns, conv_tile_columns(tile)) * groups;
  const int64_t steps = ceil_div(depth * element_bytes(math), kConvRowBytes);
  return {tile, may_split ? choose_splits(blocks, steps, multiprocessors) : 1};
}

void causal_conv3d_gemm_cuda(const ConvGemm& params, Stream stream) {
  const DeviceGuard guard(params.device_index);
  switch (params.math) {
    case ConvMath::kBFloat16: return run<ConvMath::kBFloat16>(params, stream);
    case ConvMath::kFloat16: return run<ConvMath::kFloat16>(params, stream);
    case ConvMath::kTf32: return run<ConvMath::kTf32>(params, stream);
    case ConvMath::kFloat32: return run<ConvMath::kFloat32>(params, stream);
  }
}

}  // namespace vtok
