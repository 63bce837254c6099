// The weight's gradient: grad_weight[n, k] = sum over m of grad[m, n] * source[position m, k].
//
//   a block owns Tile::rows output channels x Tile::columns places (tap, channel) and walks along
//   the positions. Both operands lie in shared memory with a position per row, channels side by
//   side as in global memory; ldmatrix transposes them on the way to the registers.
//
// The sum over positions is split over blocks; partial sums are added in a fixed order. The bias's
// gradient is summed from the tiles of grad by the blocks of the first column tile.
#pragma once

#include "causal_conv3d_gather.cuh"
#include "causal_conv3d_math.cuh"
#include "causal_conv3d_tiles.h"

namespace vtok {

template <typename T, int kIndex>
struct ConvGradientTraits {
  static constexpr ConvTile kTile = kConvGradientTiles[kIndex];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kWarpRows = kTile.warp_rows / 16;
  static constexpr int kWarpColumns = kTile.warp_columns / 8;
  static constexpr int kWarpsAlongColumns = kTile.columns / kTile.warp_columns;
  static constexpr int kWidth = kConvVectorBytes / sizeof(T);
  static constexpr int kStep = kConvRowBytes / sizeof(T);  // positions per step
  static constexpr int kVectors = kTile.rows / kWidth;     // of one position
  static constexpr int kLines = kThreads / kVectors;       // positions loaded at a time
  static constexpr int kLoads = kStep / kLines;
  static constexpr int kTileBytes = kTile.rows * kConvRowBytes;  // of one operand
  static_assert(kTile.rows == kTile.columns, "both operands are loaded alike");
  static_assert(kStep % kLines == 0 && kVectors >= 8, "all threads load; eight banks to swizzle");
  static_assert(kTile.rows <= kThreads, "a thread sums the bias of a channel");
};

// Byte offset of vector `vector` of position `line` in an operand's tile.
template <int kVectors>
__device__ __forceinline__ int conv_gradient_swizzle(int line, int vector) {
  return (line * kVectors + (vector ^ (line & 7))) * kConvVectorBytes;
}

// A position of the output, advanced without divisions.
struct ConvPosition {
  int batch, time, row, column;
};

__device__ __forceinline__ void conv_move(const ConvSource& source, ConvPosition& at, int count) {
  at.column += count;
  while (at.column >= source.column.outputs) {
    at.column -= source.column.outputs;
    if (++at.row == source.row.outputs) {
      at.row = 0;
      if (++at.time == source.time.outputs) {
        at.time = 0;
        ++at.batch;
      }
    }
  }
}

template <typename T, typename Traits, bool kVectors>
class ConvGradientLoader {
 public:
  __device__ __forceinline__ ConvGradientLoader(const ConvWeightGradient& params, int first_row,
                                                int first_column, int group, int first_position)
      : params_(params),
        line_(threadIdx.x / Traits::kVectors),
        vector_(threadIdx.x % Traits::kVectors),
        row_(first_row + vector_ * Traits::kWidth),
        place_(first_column + vector_ * Traits::kWidth),
        tap_(conv_tap(params.source, place_)),
        group_offset_(int64_t{group} * params.source.channels),
        grad_stride_(int64_t{params.source.groups} * params.columns) {
    grad_ = static_cast<const T*>(params.grad) + int64_t{group} * params.columns;
    position_ = first_position + line_;
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      positions_[i] = {0, 0, 0, 0};
      conv_move(params.source, positions_[i], position_ + i * Traits::kLines);
    }
  }

  // Starts loading the next step: grad, then the source.
  __device__ __forceinline__ void load(char* stage) {
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      const int line = line_ + i * Traits::kLines;
      const int position = position_ + i * Traits::kLines;
      const int to = conv_gradient_swizzle<Traits::kVectors>(line, vector_);
      load_grad(stage + to, position);
      load_source(stage + Traits::kTileBytes + to, position, positions_[i]);
      conv_move(params_.source, positions_[i], Traits::kStep);
    }
    position_ += Traits::kStep;
  }

 private:
  __device__ __forceinline__ void load_grad(char* to, int position) {
    const T* from = grad_ + position * grad_stride_ + row_;
    if constexpr (kVectors) {
      const bool valid = position < params_.source.positions && row_ < params_.columns;
      cp_async<kConvVectorBytes>(to, valid ? from : grad_, valid);
    } else {
      Vector<T, Traits::kWidth> word;
#pragma unroll
      for (int e = 0; e < Traits::kWidth; ++e) {
        const bool valid = position < params_.source.positions && row_ + e < params_.columns;
        word.values[e] = valid ? from[e] : from_float<T>(0.0f);
      }
      store_vector(to, word);
    }
  }

  __device__ __forceinline__ void load_source(char* to, int position, const ConvPosition& at) {
    const ConvSource& source = params_.source;
    const ConvRow row = {position < source.positions ? at.batch : -1,
                         at.time * source.time.step + source.time.offset,
                         at.row * source.row.step + source.row.offset,
                         at.column * source.column.step + source.column.offset};
    ConvTap tap = tap_;
    const T* from = conv_locate<T>(source, row, tap);
    if constexpr (kVectors) {
      const bool valid = from != nullptr;
      cp_async<kConvVectorBytes>(
          to, valid ? static_cast<const void*>(from + group_offset_ + tap.channel) : source.data,
          valid);
    } else {
      Vector<T, Traits::kWidth> word;
#pragma unroll
      for (int e = 0; e < Traits::kWidth; ++e) {
        word.values[e] = from == nullptr ? from_float<T>(0.0f) : from[group_offset_ + tap.channel];
        if (conv_advance(source, tap, 1)) from = conv_locate<T>(source, row, tap);
      }
      store_vector(to, word);
    }
  }

  const ConvWeightGradient& params_;
  int line_, vector_, row_, place_;
  ConvTap tap_;
  int64_t group_offset_, grad_stride_;
  const T* grad_;
  int position_;
  ConvPosition positions_[Traits::kLoads];
};

// Element `channel` of position `line` in an operand's tile.
template <typename T, typename Traits>
__device__ __forceinline__ T conv_gradient_element(const char* tile, int line, int channel) {
  const int vector = conv_gradient_swizzle<Traits::kVectors>(line, channel / Traits::kWidth);
  return load_vector<Vector<T, 1>>(tile + vector + channel % Traits::kWidth * sizeof(T)).values[0];
}

// sums += grad tile^T * source tile over the positions of a step, with ldmatrix and mma.
template <typename T, typename Traits>
__device__ __forceinline__ void conv_gradient_multiply_half(
    float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4], const char* stage, int row,
    int column) {
  const int matrix = threadIdx.x % 32 / 8;
  const int line = threadIdx.x % 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[Traits::kWarpRows][4];
    uint32_t b[Traits::kWarpColumns / 2][4];
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) {
      const int at = half * 16 + (matrix >> 1) * 8 + line;
      ldmatrix_x4_trans(a[i], stage + conv_gradient_swizzle<Traits::kVectors>(
                                          at, (row + i * 16) / 8 + (matrix & 1)));
    }
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns / 2; ++j) {
      const int at = half * 16 + (matrix & 1) * 8 + line;
      ldmatrix_x4_trans(b[j], stage + Traits::kTileBytes +
                                  conv_gradient_swizzle<Traits::kVectors>(
                                      at, (column + j * 16) / 8 + (matrix >> 1)));
    }
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kWarpColumns; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16<T>(sums[i][j], a[i], pair);
      }
    }
  }
}

// The same in tf32: ldmatrix cannot transpose 32-bit values, so they are read one by one.
template <typename Traits>
__device__ __forceinline__ void conv_gradient_multiply_tf32(
    float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4], const char* stage, int row,
    int column) {
  const int group = threadIdx.x % 32 / 4;
  const int member = threadIdx.x % 4;
  const auto read = [](const char* tile, int line, int channel) {
    return float_to_tf32(conv_gradient_element<float, Traits>(tile, line, channel));
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[Traits::kWarpRows][4];
    uint32_t b[Traits::kWarpColumns][2];
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        a[i][e] = read(stage, half * 8 + member + e / 2 * 4, row + i * 16 + group + e % 2 * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        b[j][e] =
            read(stage + Traits::kTileBytes, half * 8 + member + e * 4, column + j * 8 + group);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kWarpColumns; ++j) mma_m16n8k8_tf32(sums[i][j], a[i], b[j]);
    }
  }
}

// The same in exact float32; a thread multiplies for the elements that mma would give it.
template <typename Traits>
__device__ __forceinline__ void conv_gradient_multiply_float(
    float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4], const char* stage, int row,
    int column) {
  const int group = threadIdx.x % 32 / 4;
  const int member = threadIdx.x % 4;
#pragma unroll 1
  for (int line = 0; line < Traits::kStep; ++line) {
    float b[Traits::kWarpColumns][2];
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        b[j][e] = conv_gradient_element<float, Traits>(stage + Traits::kTileBytes, line,
                                                       column + j * 8 + member * 2 + e);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a =
            conv_gradient_element<float, Traits>(stage, line, row + i * 16 + half * 8 + group);
#pragma unroll
        for (int j = 0; j < Traits::kWarpColumns; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = sums[i][j][half * 2 + e];
            sum = __fmaf_rn(a, b[j][e], sum);
          }
        }
      }
    }
  }
}

template <ConvMath kMath, typename Traits>
__device__ __forceinline__ void conv_gradient_multiply(
    float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4], const char* stage) {
  const int warp = threadIdx.x / 32;
  const int row = warp / Traits::kWarpsAlongColumns * Traits::kTile.warp_rows;
  const int column = warp % Traits::kWarpsAlongColumns * Traits::kTile.warp_columns;
  if constexpr (kMath == ConvMath::kFloat32) {
    conv_gradient_multiply_float<Traits>(sums, stage, row, column);
  } else if constexpr (kMath == ConvMath::kTf32) {
    conv_gradient_multiply_tf32<Traits>(sums, stage, row, column);
  } else {
    conv_gradient_multiply_half<typename ConvElement<kMath>::type, Traits>(sums, stage, row,
                                                                           column);
  }
}

// Writes the sums as partial sums [splits, groups * columns, depth + 1], of which the last place
// belongs to the bias.
template <typename Traits>
__device__ __forceinline__ void conv_gradient_store(
    const ConvWeightGradient& params, int first_row, int first_column, int group, float bias,
    const float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4]) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int row =
      first_row + warp / Traits::kWarpsAlongColumns * Traits::kTile.warp_rows + lane / 4;
  const int column =
      first_column + warp % Traits::kWarpsAlongColumns * Traits::kTile.warp_columns + lane % 4 * 2;
  const int64_t width = params.source.depth + 1;
  float* partial = params.partial +
                   (int64_t{blockIdx.z} * params.source.groups + group) * params.columns * width;
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows * 2; ++i) {
    const int channel = row + i * 8;
    if (channel >= params.columns) continue;
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns * 2; ++j) {
      const int place = column + j / 2 * 8 + j % 2;
      if (place >= params.source.depth) continue;
      partial[channel * width + place] = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
    }
  }
  const int own = first_row + static_cast<int>(threadIdx.x);
  if (first_column == 0 && threadIdx.x < Traits::kTile.rows && own < params.columns) {
    partial[own * width + width - 1] = bias;
  }
}

// Grid: (tiles of output channels x tiles of places x groups, 1, splits).
template <ConvMath kMath, int kTileIndex, bool kVectors>
__global__ void __launch_bounds__(
    ConvGradientTraits<typename ConvElement<kMath>::type, kTileIndex>::kThreads)
    causal_conv3d_weight_gradient_kernel(const ConvWeightGradient params) {
  using T = typename ConvElement<kMath>::type;
  using Traits = ConvGradientTraits<T, kTileIndex>;
  VTOK_DYNAMIC_SHARED(char, shared);  // [stages, 2, kStep, rows]
  const int row_tiles = (params.columns + Traits::kTile.rows - 1) / Traits::kTile.rows;
  const int first_row = blockIdx.x % row_tiles * Traits::kTile.rows;
  const int group = blockIdx.x / row_tiles % params.source.groups;
  const int first_column = blockIdx.x / (row_tiles * params.source.groups) * Traits::kTile.columns;
  const int steps = (params.source.positions + Traits::kStep - 1) / Traits::kStep;
  const int first = int64_t{steps} * blockIdx.z / params.splits;
  const int last = int64_t{steps} * (blockIdx.z + 1) / params.splits;
  ConvGradientLoader<T, Traits, kVectors> loader(params, first_row, first_column, group,
                                                 first * Traits::kStep);
  constexpr int kStages = Traits::kTile.stages;
  constexpr int kStageBytes = 2 * Traits::kTileBytes;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (first + stage < last) loader.load(shared + stage * kStageBytes);
    cp_async_commit();
  }
  float sums[Traits::kWarpRows][Traits::kWarpColumns][4] = {};
  float bias = 0.0f;
  const bool sums_bias = first_column == 0 && threadIdx.x < Traits::kTile.rows;
  int reading = 0;
  int writing = kStages - 1;
  for (int step = first; step < last; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived, and nobody reads the stage that is filled next
    if (step + kStages - 1 < last) loader.load(shared + writing * kStageBytes);
    cp_async_commit();
    const char* stage = shared + reading * kStageBytes;
    conv_gradient_multiply<kMath, Traits>(sums, stage);
    if (sums_bias) {
      for (int line = 0; line < Traits::kStep; ++line) {
        bias += to_float(conv_gradient_element<T, Traits>(stage, line, threadIdx.x));
      }
    }
    reading = reading + 1 == kStages ? 0 : reading + 1;
    writing = writing + 1 == kStages ? 0 : writing + 1;
  }
  conv_gradient_store<Traits>(params, first_row, first_column, group, bias, sums);
}

template <ConvMath kMath, int kTileIndex, bool kVectors>
void launch_conv_weight_gradient(const ConvWeightGradient& params, Stream stream) {
  constexpr ConvTile kTile = kConvGradientTiles[kTileIndex];
  const int64_t row_tiles = (params.columns + kTile.rows - 1) / kTile.rows;
  const int64_t column_tiles = (params.source.depth + kTile.columns - 1) / kTile.columns;
  const int64_t blocks = row_tiles * column_tiles * params.source.groups;
  VTOK_CHECK_VALUE(blocks <= INT32_MAX, "causal_conv3d: weight must have at most 2^31 blocks, got ",
                   blocks);
  VTOK_LAUNCH((causal_conv3d_weight_gradient_kernel<kMath, kTileIndex, kVectors>),
              dim3(static_cast<unsigned>(blocks), 1, params.splits), dim3(kTile.threads()),
              kTile.shared_bytes(), stream, params);
}

// Instantiated in causal_conv3d_cuda_gradient_*.cu, one format per file.
template <ConvMath kMath>
void run_conv_weight_gradient(const ConvWeightGradient& params, Stream stream) {
  // Exact float32 and unaligned loads have the small tile alone.
  if constexpr (kMath != ConvMath::kFloat32) {
    if (params.vectors && params.tile == 0) {
      return launch_conv_weight_gradient<kMath, 0, true>(params, stream);
    }
  }
  if (params.vectors) return launch_conv_weight_gradient<kMath, 1, true>(params, stream);
  launch_conv_weight_gradient<kMath, 1, false>(params, stream);
}

}  // namespace vtok
