// The weight's gradient: grad_weight[n, k] = sum over m of grad[m, n] * source[position m, k].
//
//   a block owns Tile::rows output channels x Tile::columns places (tap, channel) and walks along
//   the positions. Both operands lie in shared memory with a position per row, channels side by
//   side as in global memory; ldmatrix transposes them on the way to the registers.
//
// The sum over positions is split over blocks; partial sums are added in a fixed order. The bias's
// gradient is summed from the tiles of grad by the blocks of the first column tile.
#pragma once

#include "causal_conv3d_loader.cuh"
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
  static constexpr int kBlockDistance = 16;                      // rows between a warp's mma tiles

  // Of the calling warp.
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsAlongColumns * kTile.warp_rows;
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsAlongColumns * kTile.warp_columns;
  }

  static_assert(kTile.rows == kTile.columns, "both operands are loaded alike");
  static_assert(kStep % kLines == 0 && kVectors >= 8, "all threads load; eight banks to swizzle");
  static_assert(kTile.rows <= kThreads, "a thread sums the bias of a channel");
};

// Byte offset of vector `vector` of position `line` in an operand's tile.
template <int kVectors>
__device__ __forceinline__ int conv_gradient_swizzle(int line, int vector) {
  return (line * kVectors + (vector ^ (line & 7))) * kConvVectorBytes;
}

// A position of the output.
struct ConvPosition {
  int batch, time, row, column;
};

// A distance of positions, cut up like a position, so that moving by it is one carry an axis.
class ConvPositionStep {
 public:
  __device__ __forceinline__ ConvPositionStep(const ConvSource& source, int count) {
    step_.column = count % source.column.outputs;
    count /= source.column.outputs;
    step_.row = count % source.row.outputs;
    count /= source.row.outputs;
    step_.time = count % source.time.outputs;
    step_.batch = count / source.time.outputs;
  }

  __device__ __forceinline__ void move(const ConvSource& source, ConvPosition& at) const {
    at.column += step_.column;
    const int next_row = at.column >= source.column.outputs;
    at.column -= next_row ? source.column.outputs : 0;
    at.row += step_.row + next_row;
    const int next_time = at.row >= source.row.outputs;
    at.row -= next_time ? source.row.outputs : 0;
    at.time += step_.time + next_time;
    const int next_batch = at.time >= source.time.outputs;
    at.time -= next_batch ? source.time.outputs : 0;
    at.batch += step_.batch + next_batch;
  }

 private:
  ConvPosition step_;
};

// Where a position lies in a plain source at tap 0, see ConvPlainRows; offsets wrap and are those
// of the first frame.
struct ConvPlainOrigin {
  int time, row, column;
  uint32_t offset;

  __device__ __forceinline__ ConvPlainOrigin(const ConvSource& source, const ConvPosition& at)
      : time(at.time * source.time.step + source.time.offset),
        row(at.row * source.row.step + source.row.offset),
        column(at.column * source.column.step + source.column.offset) {
    const ConvStrides& s = source.strides;
    offset = static_cast<uint32_t>(at.batch) * static_cast<uint32_t>(s.batch) +
             static_cast<uint32_t>(row) * static_cast<uint32_t>(s.row) +
             static_cast<uint32_t>(column) * static_cast<uint32_t>(s.column);
  }
};

// A tap and channel of a plain source, for any position.
class ConvPlainTap {
 public:
  __device__ __forceinline__ void set(const ConvSource& source, const ConvTap& tap) {
    // Beyond the depth: never inside.
    time_ = tap.time < source.time.taps ? tap.time * source.time.tap_step : INT32_MAX / 2;
    row_ = tap.row * source.row.tap_step;
    column_ = tap.column * source.column.tap_step;
    const ConvStrides& s = source.strides;
    offset_ = static_cast<uint32_t>(row_) * static_cast<uint32_t>(s.row) +
              static_cast<uint32_t>(column_) * static_cast<uint32_t>(s.column) +
              static_cast<uint32_t>(tap.channel);
  }
  // The element's offset in the source; says whether it is there.
  __device__ __forceinline__ int32_t offset(const ConvSource& source, const ConvPlainOrigin& from,
                                            bool& inside) const {
    const int first = source.replicate ? 0 : INT32_MIN;
    const int time = from.time + time_ > first ? from.time + time_ : first;
    inside = inside && is_inside(source.time, time) && is_inside(source.row, from.row + row_) &&
             is_inside(source.column, from.column + column_);
    return static_cast<int32_t>(from.offset + offset_ +
                                static_cast<uint32_t>(time) *
                                    static_cast<uint32_t>(source.strides.time));
  }

 private:
  static __device__ __forceinline__ bool is_inside(const ConvAxis& axis, int coordinate) {
    return static_cast<uint32_t>(coordinate) < static_cast<uint32_t>(axis.extent);
  }

  int time_, row_, column_;
  uint32_t offset_;
};

template <typename T, typename Traits, ConvLoads kLoads>
class ConvGradientLoader {
 public:
  static constexpr bool kVectors = kLoads != ConvLoads::kElements;

  __device__ __forceinline__ ConvGradientLoader(const ConvWeightGradient& params, int first_row,
                                                int first_column, int group, int first_position)
      : params_(params),
        line_(threadIdx.x / Traits::kVectors),
        vector_(threadIdx.x % Traits::kVectors),
        row_(first_row + vector_ * Traits::kWidth),
        tap_(conv_tap(params.source, first_column + vector_ * Traits::kWidth)),
        group_offset_(int64_t{group} * params.source.channels),
        grad_stride_(int64_t{params.source.groups} * params.columns),
        step_(params.source, Traits::kStep) {
    plain_.set(params.source, tap_);
    position_ = first_position + line_;
    grad_ = static_cast<const T*>(params.grad) + int64_t{group} * params.columns + row_ +
            position_ * grad_stride_;
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      positions_[i] = {0, 0, 0, 0};
      ConvPositionStep(params.source, position_ + i * Traits::kLines)
          .move(params.source, positions_[i]);
    }
  }

  // Starts loading the next step: grad, then the source.
  __device__ __forceinline__ void load(char* stage) {
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      const int line = line_ + i * Traits::kLines;
      const bool valid = position_ + i * Traits::kLines < params_.source.positions;
      const int to = conv_gradient_swizzle<Traits::kVectors>(line, vector_);
      load_grad(stage + to, grad_ + int64_t{i * Traits::kLines} * grad_stride_, valid);
      load_source(stage + Traits::kTileBytes + to, valid, positions_[i]);
      step_.move(params_.source, positions_[i]);
    }
    position_ += Traits::kStep;
    grad_ += Traits::kStep * grad_stride_;
  }

 private:
  __device__ __forceinline__ void load_grad(char* to, const T* from, bool valid) {
    if constexpr (kVectors) {
      cp_async<kConvVectorBytes>(to, from, valid && row_ < params_.columns);
    } else {
      Vector<T, Traits::kWidth> word;
#pragma unroll
      for (int e = 0; e < Traits::kWidth; ++e) {
        word.values[e] = valid && row_ + e < params_.columns ? from[e] : from_float<T>(0.0f);
      }
      store_vector(to, word);
    }
  }

  __device__ __forceinline__ void load_source(char* to, bool valid, const ConvPosition& at) {
    const ConvSource& source = params_.source;
    if constexpr (kLoads == ConvLoads::kPlain) {
      const ConvPlainOrigin origin(source, at);
      const T* data = static_cast<const T*>(source.data) + group_offset_;
      const int32_t offset = plain_.offset(source, origin, valid);
      cp_async<kConvVectorBytes>(to, data + offset, valid);
      return;
    }
    const ConvRow row = {valid ? at.batch : -1, at.time * source.time.step + source.time.offset,
                         at.row * source.row.step + source.row.offset,
                         at.column * source.column.step + source.column.offset};
    ConvTap tap = tap_;
    const T* from = conv_locate<T>(source, row, tap);
    if constexpr (kLoads == ConvLoads::kGeneral) {
      const bool found = from != nullptr;
      cp_async<kConvVectorBytes>(
          to, found ? static_cast<const void*>(from + group_offset_ + tap.channel) : source.data,
          found);
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
  int line_, vector_, row_;
  ConvTap tap_;
  int64_t group_offset_, grad_stride_;
  ConvPositionStep step_;
  ConvPlainTap plain_;
  const T* grad_;  // of the first line, at row_
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
  const int row = Traits::warp_row();
  const int column = Traits::warp_column();
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
    const ConvWeightGradient& params, const ConvBlock& block, float bias,
    const float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4]) {
  const int row = block.first_row + Traits::warp_row() + threadIdx.x % 32 / 4;
  const int column = block.first_column + Traits::warp_column() + threadIdx.x % 4 * 2;
  const int64_t width = params.source.depth + 1;
  float* partial = params.partial + (int64_t{blockIdx.z} * params.source.groups + block.group) *
                                        params.columns * width;
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows * 2; ++i) {
    const int channel = row + i / 2 * Traits::kBlockDistance + i % 2 * 8;
    if (channel >= params.columns) continue;
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns * 2; ++j) {
      const int place = column + j / 2 * 8 + j % 2;
      if (place >= params.source.depth) continue;
      partial[channel * width + place] = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
    }
  }
  const int own = block.first_row + static_cast<int>(threadIdx.x);
  if (block.first_column == 0 && threadIdx.x < Traits::kTile.rows && own < params.columns) {
    partial[own * width + width - 1] = bias;
  }
}

// Which part of the sums a block computes; steps are along the positions.
template <typename Traits>
__device__ __forceinline__ ConvBlock conv_gradient_block(const ConvWeightGradient& params) {
  const int row_tiles = (params.columns + Traits::kTile.rows - 1) / Traits::kTile.rows;
  const int steps = (params.source.positions + Traits::kStep - 1) / Traits::kStep;
  ConvBlock block;
  block.first_row = blockIdx.x % row_tiles * Traits::kTile.rows;
  block.group = blockIdx.x / row_tiles % params.source.groups;
  block.first_column = blockIdx.x / (row_tiles * params.source.groups) * Traits::kTile.columns;
  block.first_step = int64_t{steps} * blockIdx.z / params.splits;
  block.last_step = int64_t{steps} * (blockIdx.z + 1) / params.splits;
  return block;
}

// Grid: (tiles of output channels x tiles of places x groups, 1, splits).
template <ConvMath kMath, int kTileIndex, ConvLoads kLoads>
__global__ void __launch_bounds__(
    ConvGradientTraits<typename ConvElement<kMath>::type, kTileIndex>::kThreads)
    causal_conv3d_weight_gradient_kernel(const ConvWeightGradient params) {
  using T = typename ConvElement<kMath>::type;
  using Traits = ConvGradientTraits<T, kTileIndex>;
  VTOK_DYNAMIC_SHARED(char, shared);  // [stages, 2, kStep, rows]
  const ConvBlock block = conv_gradient_block<Traits>(params);
  const int first = block.first_step, last = block.last_step;
  ConvGradientLoader<T, Traits, kLoads> loader(params, block.first_row, block.first_column,
                                               block.group, first * Traits::kStep);
  constexpr int kStages = Traits::kTile.stages;
  constexpr int kStageBytes = 2 * Traits::kTileBytes;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (first + stage < last) loader.load(shared + stage * kStageBytes);
    cp_async_commit();
  }
  float sums[Traits::kWarpRows][Traits::kWarpColumns][4] = {};
  float bias = 0.0f;
  const bool sums_bias = block.first_column == 0 && threadIdx.x < Traits::kTile.rows;
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
  conv_gradient_store<Traits>(params, block, bias, sums);
}

// The number of blocks, without splits.
inline unsigned conv_gradient_num_blocks(const ConvWeightGradient& params, int tile_rows,
                                         int tile_columns) {
  const int64_t row_tiles = (int64_t{params.columns} + tile_rows - 1) / tile_rows;
  const int64_t column_tiles = (int64_t{params.source.depth} + tile_columns - 1) / tile_columns;
  const int64_t blocks = row_tiles * column_tiles * params.source.groups;
  VTOK_CHECK_VALUE(blocks <= INT32_MAX, "causal_conv3d: weight must have at most 2^31 blocks, got ",
                   blocks);
  return static_cast<unsigned>(blocks);
}

template <ConvMath kMath, int kTileIndex, ConvLoads kLoads>
void launch_conv_weight_gradient(const ConvWeightGradient& params, Stream stream) {
  constexpr ConvTile kTile = kConvGradientTiles[kTileIndex];
  const unsigned blocks = conv_gradient_num_blocks(params, kTile.rows, kTile.columns);
  VTOK_LAUNCH((causal_conv3d_weight_gradient_kernel<kMath, kTileIndex, kLoads>),
              dim3(blocks, 1, params.splits), dim3(kTile.threads()), kTile.shared_bytes(), stream,
              params);
}

// Instantiated in causal_conv3d_cuda_gradient_*.cu, one format per file.
template <ConvMath kMath>
void run_conv_weight_gradient(const ConvWeightGradient& params, Stream stream);

}  // namespace vtok
