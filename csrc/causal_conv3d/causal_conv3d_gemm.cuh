// The convolution as a product of matrices, one kernel for every direction, format and tile.
//
//   a block owns Tile::rows positions x Tile::columns channels and walks along k in steps of 64
//   bytes; `stages` of them are under way through cp.async, whose predicate writes the zeros of
//   padding. Without aligned vectors (3 channels, say) values are loaded one by one instead.
//
// Note [Bits do not depend on the tile]
// Each output adds its products in the order of k, in instructions of one shape, whatever the tile
// and the rows beside it: a stream gives the same bits for any chunks. Splitting the sum over k
// would change them, so streams do not split.
#pragma once

#include "causal_conv3d_epilogue.cuh"
#include "causal_conv3d_gather.cuh"
#include "causal_conv3d_math.cuh"
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
  static_assert(kStageBytes * kTile.stages <= 99 << 10, "shared memory of every chip from sm_80");
};

// Loads one thread's share of the tiles, step after step along k.
template <typename T, typename Traits, bool kVectors>
class ConvLoader {
 public:
  static constexpr int kWidth = kConvVectorBytes / sizeof(T);
  static constexpr int kDepth = Traits::kRowBytes / sizeof(T);  // of k per step

  __device__ __forceinline__ ConvLoader(const ConvGemm& params, int first_row, int first_column,
                                        int group, int first_k)
      : params_(params),
        line_(threadIdx.x / Traits::kRowVectors),
        vector_(threadIdx.x % Traits::kRowVectors),
        k_(first_k + vector_ * kWidth),
        tap_(conv_tap(params.source, k_)),
        first_column_(first_column) {
    group_offset_ = int64_t{group} * params.source.channels;
    weight_ = static_cast<const T*>(params.weight) +
              int64_t{group} * params.columns * params.source.depth;
#pragma unroll
    for (int i = 0; i < Traits::kRowLoads; ++i) {
      rows_[i] = conv_row(params.source, first_row + line_ + i * Traits::kLines);
    }
    if constexpr (kVectors) locate();
  }

  // Starts loading the next step into a stage: rows, then columns.
  __device__ __forceinline__ void load(char* stage) {
    if constexpr (kVectors) {
      load_vectors(stage);
      if (conv_advance(params_.source, tap_, kDepth)) locate();
    } else {
      load_elements(stage);
      conv_advance(params_.source, tap_, kDepth);
    }
    k_ += kDepth;
  }

 private:
  __device__ __forceinline__ void locate() {
#pragma unroll
    for (int i = 0; i < Traits::kRowLoads; ++i) {
      const T* found = conv_locate<T>(params_.source, rows_[i], tap_);
      sources_[i] = found == nullptr ? nullptr : found + group_offset_;
    }
  }

  __device__ __forceinline__ void load_vectors(char* stage) {
#pragma unroll
    for (int i = 0; i < Traits::kRowLoads; ++i) {
      const bool valid = sources_[i] != nullptr;
      const void* source =
          valid ? static_cast<const void*>(sources_[i] + tap_.channel) : params_.source.data;
      cp_async<kConvVectorBytes>(stage + Traits::offset(line_ + i * Traits::kLines, vector_),
                                 source, valid);
    }
    char* columns = stage + Traits::kTile.rows * Traits::kRowBytes;
#pragma unroll
    for (int i = 0; i < Traits::kColumnLoads; ++i) {
      const int line = line_ + i * Traits::kLines;
      if (Traits::kTile.columns < Traits::kLines && line >= Traits::kTile.columns) break;
      const int column = first_column_ + line;
      const bool valid = column < params_.columns && k_ < params_.source.depth;
      cp_async<kConvVectorBytes>(
          columns + Traits::offset(line, vector_),
          valid ? weight_ + int64_t{column} * params_.source.depth + k_ : weight_, valid);
    }
  }

  __device__ __forceinline__ void load_elements(char* stage) {
#pragma unroll  // rows_ indexed at run time would lie in local memory, and params with it
    for (int i = 0; i < Traits::kRowLoads; ++i) {
      Vector<T, kWidth> word;
      ConvTap tap = tap_;
      const T* source = conv_locate<T>(params_.source, rows_[i], tap);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        word.values[e] =
            source == nullptr ? from_float<T>(0.0f) : source[group_offset_ + tap.channel];
        if (conv_advance(params_.source, tap, 1)) {
          source = conv_locate<T>(params_.source, rows_[i], tap);
        }
      }
      store_vector(stage + Traits::offset(line_ + i * Traits::kLines, vector_), word);
    }
    char* columns = stage + Traits::kTile.rows * Traits::kRowBytes;
#pragma unroll
    for (int i = 0; i < Traits::kColumnLoads; ++i) {
      const int line = line_ + i * Traits::kLines;
      if (Traits::kTile.columns < Traits::kLines && line >= Traits::kTile.columns) break;
      const int column = first_column_ + line;
      const T* source = weight_ + int64_t{column} * params_.source.depth + k_;
      Vector<T, kWidth> word;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const bool valid = column < params_.columns && k_ + e < params_.source.depth;
        word.values[e] = valid ? source[e] : from_float<T>(0.0f);
      }
      store_vector(columns + Traits::offset(line, vector_), word);
    }
  }

  const ConvGemm& params_;
  int line_, vector_, k_;
  ConvTap tap_;
  int first_column_;
  int64_t group_offset_;
  const T* weight_;
  ConvRow rows_[Traits::kRowLoads];
  const T* sources_[Traits::kRowLoads];
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

// Lane m of four neighbouring lanes passes its pair of tile j on to lane j and receives the pairs
// of tile m: eight neighbouring channels in place of two of each of four tiles.
__device__ __forceinline__ void conv_exchange(float (&octet)[8]) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
    const bool upper = member & distance;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      if (tile & distance) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& low = octet[tile * 2 + e];
        float& high = octet[(tile + distance) * 2 + e];
        const float received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
        (upper ? low : high) = received;
      }
    }
  }
}

// Hands the sums on: to the epilogue, or as partial sums.
template <typename T, typename Traits>
__device__ __forceinline__ void conv_store(
    const ConvGemm& params, int first_row, int first_column, int group,
    const float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4]) {
  const int member = threadIdx.x % 4;
  const int row = first_row + Traits::warp_row() + threadIdx.x % 32 / 4;
  const int column = first_column + Traits::warp_column();
  const int64_t all_columns = int64_t{params.source.groups} * params.columns;
  const float mix = conv_mix(params.epilogue);
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows * 2; ++i) {
    const int position = row + i / 2 * Traits::kBlockDistance + i % 2 * 8;
    const bool valid = position < params.source.positions;
    const int64_t at =
        params.splits > 1 ? (int64_t{blockIdx.z} * params.source.positions + position) * all_columns
                          : conv_output_offset(params.source, params.epilogue.strides, position);
    if constexpr (sizeof(T) == 2 && Traits::kWarpColumns % 4 == 0) {
      if (params.octets) {  // the same for all threads
#pragma unroll
        for (int j = 0; j < Traits::kWarpColumns; j += 4) {
          float octet[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) octet[e] = sums[i / 2][j + e / 2][i % 2 * 2 + e % 2];
          conv_exchange(octet);
          const int here = column + (j + member) * 8;
          if (!valid || here >= params.columns) continue;
          const int channel = group * params.columns + here;
          conv_finish<T>(params.epilogue, mix, channel, at + channel, octet);
        }
        continue;
      }
    }
    if (!valid) continue;
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns; ++j) {
      const int here = column + j * 8 + member * 2;
      if (here >= params.columns) continue;
      const int channel = group * params.columns + here;
      const float pair[2] = {sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]};
      const bool both = here + 1 < params.columns;
      if (params.splits > 1) {
        params.partial[at + channel] = pair[0];
        if (both) params.partial[at + channel + 1] = pair[1];
      } else if (params.pairs && both) {
        conv_finish<T>(params.epilogue, mix, channel, at + channel, pair);
      } else {
        conv_finish<T>(params.epilogue, mix, channel, at + channel, {pair[0]});
        if (both) conv_finish<T>(params.epilogue, mix, channel + 1, at + channel + 1, {pair[1]});
      }
    }
  }
}

// Which part of the product a block computes.
struct ConvBlock {
  int first_row, first_column, group;
  int first_step, last_step;  // along k
};

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
// blocks that run together read the same rows.
//
// ptxas decides how many blocks share a multiprocessor (0), but for values of four bytes and few
// columns: there it wants four or more blocks and spills 8 to 28 bytes; three leave enough
// registers.
template <ConvMath kMath, int kTileIndex, bool kVectors>
__global__ void __launch_bounds__(ConvTileTraits<kTileIndex>::kThreads,
                                  kMath >= ConvMath::kTf32 && kTileIndex == 4 ? 3 : 0)
    causal_conv3d_gemm_kernel(const ConvGemm params) {
  using T = typename ConvElement<kMath>::type;
  using Traits = ConvTileTraits<kTileIndex>;
  using Loader = ConvLoader<T, Traits, kVectors>;
  VTOK_DYNAMIC_SHARED(char, shared);  // [stages, rows + columns, 64]
  const ConvBlock block = conv_block<Traits>(params, Loader::kDepth);
  const int first = block.first_step, last = block.last_step;
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
  conv_store<T, Traits>(params, block.first_row, block.first_column, block.group, sums);
}

template <ConvMath kMath, int kTileIndex, bool kVectors>
void launch_conv_gemm(const ConvGemm& params, Stream stream) {
  constexpr ConvTile kTile = kConvTiles[kTileIndex];
  const int64_t row_tiles = (int64_t{params.source.positions} + kTile.rows - 1) / kTile.rows;
  const int64_t column_tiles = (params.columns + kTile.columns - 1) / kTile.columns;
  const int64_t blocks = row_tiles * column_tiles * params.source.groups;
  VTOK_CHECK_VALUE(blocks <= INT32_MAX, "causal_conv3d: output must have at most 2^31 blocks, got ",
                   blocks);
  VTOK_LAUNCH((causal_conv3d_gemm_kernel<kMath, kTileIndex, kVectors>),
              dim3(static_cast<unsigned>(blocks), 1, params.splits), dim3(kTile.threads()),
              kTile.shared_bytes(), stream, params);
}

// Instantiated in causal_conv3d_cuda_*.cu, one format per file.
template <ConvMath kMath>
void run_conv_gemm(const ConvGemm& params, Stream stream);

}  // namespace vtok
