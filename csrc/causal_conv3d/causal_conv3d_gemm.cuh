// The convolution as a product of matrices, one kernel for every direction, format and tile.
//
//   a block owns Tile::rows positions x Tile::columns channels and walks along k in steps of 64
//   bytes; `stages` of them are under way through cp.async, whose predicate writes the zeros of
//   padding. Without aligned vectors (3 channels in each of several groups, say) values are loaded
//   one by one instead.
//
// Note [Bits do not depend on the tile]
// Each output adds its products in the order of k, in instructions of one shape, whatever the tile
// and the rows beside it: a stream gives the same bits for any chunks. Splitting the sum over k
// would change them, so streams do not split.
#pragma once

#include "causal_conv3d_loader.cuh"
#include "causal_conv3d_math.cuh"
#include "causal_conv3d_store.cuh"
#include "causal_conv3d_tiles.h"

namespace vtok {

template <int kIndex>
struct ConvTileTraits {
  static constexpr ConvTile kTile = kConvTiles[kIndex];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kWarpRows = kTile.warp_rows / 16;       // mma tiles of a warp
  static constexpr int kWarpColumns = kTile.warp_columns / 8;  // likewise
  static constexpr int kWarpsAlongColumns = kTile.columns / kTile.warp_columns;
  static constexpr int kLines = kThreads / kConvRowVectors;  // tile rows filled at a time
  static constexpr int kRowLoads = kTile.rows / kLines;      // vectors that a thread loads of a
  static constexpr int kColumnLoads = (kTile.columns + kLines - 1) / kLines;
  static constexpr int kRowVectors = kConvRowVectors;
  static constexpr int kRowBytes = kConvRowBytes;
  static constexpr int kStageBytes = (kTile.rows + kTile.columns) * kRowBytes;
  static constexpr int kBlockDistance = 16;  // rows between a warp's mma tiles
  static constexpr int kSharedBytes = kTile.shared_bytes();

  static __device__ __forceinline__ int offset(int line, int vector) {
    return conv_swizzle(line, vector);
  }
  // Of the calling warp.
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsAlongColumns * kTile.warp_rows;
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsAlongColumns * kTile.warp_columns;
  }

  static_assert(kTile.rows % kLines == 0, "every thread loads equally many rows");
  static_assert(kTile.columns % kLines == 0 || kTile.columns < kLines, "likewise columns");
  static_assert(kTile.rows % kTile.warp_rows == 0 && kTile.columns % kTile.warp_columns == 0,
                "warps cover the tile");
  static_assert(kTile.warp_rows % 16 == 0 && kTile.warp_columns % 16 == 0, "mma tiles and pairs");
  static_assert(kSharedBytes <= 99 << 10, "shared memory of every chip from sm_80");
};

template <ConvMath kMath, typename Traits>
__device__ __forceinline__ void conv_multiply(
    float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4], const char* stage) {
  const int row = Traits::warp_row();
  const int column = Traits::warp_column();
  const char* columns = stage + Traits::kTile.rows * kConvRowBytes;
  if constexpr (kMath == ConvMath::kFloat32) {
    conv_multiply_float(sums, stage, columns, row, column);
  } else {
    conv_multiply_tensor_core<kMath>(sums, stage, columns, row, column);
  }
}

template <typename Traits>
__device__ __forceinline__ ConvBlock conv_block(const ConvGemm& params, int depth_of_step) {
  const int column_tiles = (params.columns + Traits::kTile.columns - 1) / Traits::kTile.columns;
  const int tile_column = blockIdx.x % (column_tiles * params.source.groups);
  const int steps = (params.source.depth + depth_of_step - 1) / depth_of_step;
  ConvBlock block;
  block.first_row = blockIdx.x / (column_tiles * params.source.groups) * Traits::kTile.rows;
  block.group = tile_column / column_tiles;
  block.first_column = tile_column % column_tiles * Traits::kTile.columns;
  block.first_step = int64_t{steps} * blockIdx.z / params.splits;
  block.last_step = int64_t{steps} * (blockIdx.z + 1) / params.splits;
  return block;
}

// Grid: (tiles of positions x tiles of columns x groups, 1, splits). Columns vary fastest, so that
// blocks that run together read the same rows. The 1 lets ptxas take the registers it needs: left
// to itself it spilled one to fit another block.
template <ConvMath kMath, int kTileIndex, ConvLoads kLoads>
__global__ void __launch_bounds__(ConvTileTraits<kTileIndex>::kThreads, 1)
    causal_conv3d_gemm_kernel(const ConvGemm params) {
  using T = typename ConvElement<kMath>::type;
  using Traits = ConvTileTraits<kTileIndex>;
  using Loader = ConvLoader<T, Traits, kLoads>;
  VTOK_DYNAMIC_SHARED(char, shared);  // [stages, rows + columns, 64], then a row's offset each
  const ConvBlock block = conv_block<Traits>(params, Loader::kDepth);
  const int first = block.first_step, last = block.last_step;
  conv_place_rows<Traits>(params, block.first_row, shared);
  Loader loader(params, block.first_row, block.first_column, block.group, first * Loader::kDepth);
  constexpr int kStages = Traits::kTile.stages;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (first + stage < last) loader.load(shared + stage * Traits::kStageBytes);
    cp_async_commit();
  }
  float sums[Traits::kWarpRows][Traits::kWarpColumns][4] = {};
  int reading = 0;
  for (int step = first; step < last; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived, and nobody reads the stage that is filled next
    // The stage read one step before; derived, since a register more than this would spill.
    const int writing = reading == 0 ? kStages - 1 : reading - 1;
    if (step + kStages - 1 < last) loader.load(shared + writing * Traits::kStageBytes);
    cp_async_commit();
    conv_multiply<kMath, Traits>(sums, shared + reading * Traits::kStageBytes);
    reading = reading + 1 == kStages ? 0 : reading + 1;
  }
  conv_store<T, Traits>(params, block.first_column, block.group, sums, shared);
}

// The number of blocks of a product, without splits.
inline unsigned conv_num_blocks(const ConvGemm& params, int tile_rows, int tile_columns) {
  const int64_t row_tiles = (int64_t{params.source.positions} + tile_rows - 1) / tile_rows;
  const int64_t column_tiles = (int64_t{params.columns} + tile_columns - 1) / tile_columns;
  const int64_t blocks = row_tiles * column_tiles * params.source.groups;
  VTOK_CHECK_VALUE(blocks <= INT32_MAX, "causal_conv3d: output must have at most 2^31 blocks, got ",
                   blocks);
  return static_cast<unsigned>(blocks);
}

template <ConvMath kMath, int kTileIndex, ConvLoads kLoads>
void launch_conv_gemm(const ConvGemm& params, Stream stream) {
  using Traits = ConvTileTraits<kTileIndex>;
  const unsigned blocks = conv_num_blocks(params, Traits::kTile.rows, Traits::kTile.columns);
  VTOK_LAUNCH((causal_conv3d_gemm_kernel<kMath, kTileIndex, kLoads>),
              dim3(blocks, 1, params.splits), dim3(Traits::kThreads), Traits::kSharedBytes, stream,
              params);
}

// Instantiated in causal_conv3d_cuda_*.cu, one format per file.
template <ConvMath kMath>
void run_conv_gemm(const ConvGemm& params, Stream stream);

}  // namespace vtok
