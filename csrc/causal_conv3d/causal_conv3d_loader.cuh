// Loads the tiles of a product into shared memory, a step along k at a time.
#pragma once

#include "../core/half.h"
#include "../core/mma.cuh"
#include "causal_conv3d_gather.cuh"
#include "causal_conv3d_math.cuh"

namespace vtok {

// Which part of the product a block computes.
struct ConvBlock {
  int first_row, first_column, group;
  int first_step, last_step;  // along k
};

enum class ConvLoads {
  kElements,  // one by one: no aligned vectors
  kGeneral,   // vectors of any source
  kPlain,     // vectors of a source with ConvSource::plain
};

// Loads one thread's share of the tiles, step after step along k: vector `vector_` of every
// kLines-th row and column from `line_` on.
template <typename T, typename Traits, ConvLoads kLoads>
class ConvLoader {
 public:
  static constexpr int kWidth = kConvVectorBytes / sizeof(T);
  static constexpr int kDepth = Traits::kRowBytes / sizeof(T);  // of k per step
  static constexpr int kLines = Traits::kLines;
  static constexpr int kLineBytes = kLines * Traits::kRowBytes;
  static_assert(kLines % 8 == 0, "lines that a thread loads have one swizzle");
  using Rows = std::conditional_t<kLoads == ConvLoads::kPlain, ConvPlainRows<T, Traits::kRowLoads>,
                                  ConvGeneralRows<T, Traits::kRowLoads>>;

  __device__ __forceinline__ ConvLoader(const ConvGemm& params, int first_row, int first_column,
                                        int group, int first_k)
      : params_(params), line_(threadIdx.x / Traits::kRowVectors), first_column_(first_column) {
    const int vector = threadIdx.x % Traits::kRowVectors;
    to_ = Traits::offset(line_, vector);
    k_ = first_k + vector * kWidth;
    tap_ = conv_tap(params.source, k_);
    const int64_t depth = params.source.depth;
    weight_ = static_cast<const T*>(params.weight) +
              (int64_t{group} * params.columns + first_column + line_) * depth + k_;
#pragma unroll
    for (int i = 0; i < Traits::kRowLoads; ++i) {
      rows_.place(params.source, i, first_row + line_ + i * kLines);
    }
    rows_.start(params.source, group);
    if constexpr (kLoads != ConvLoads::kElements) rows_.move(params.source, tap_);
  }

  // Starts loading the next step into a stage: rows, then columns.
  __device__ __forceinline__ void load(char* stage) {
    char* const columns = stage + Traits::kTile.rows * Traits::kRowBytes;
    if constexpr (kLoads == ConvLoads::kElements) {
      load_row_elements(stage);
      load_column_elements(columns);
      conv_advance(params_.source, tap_, kDepth);
    } else {
      load_row_vectors(stage);
      load_column_vectors(columns);
      if (conv_advance(params_.source, tap_, kDepth)) rows_.move(params_.source, tap_);
    }
    k_ += kDepth;
    weight_ += kDepth;
  }

 private:
  __device__ __forceinline__ bool is_column(int i) const {
    return first_column_ + line_ + i * kLines < params_.columns;
  }

  // Of fewer columns than lines, only some threads have one.
  __device__ __forceinline__ bool is_beyond_tile(int i) const {
    return Traits::kTile.columns < kLines && line_ + i * kLines >= Traits::kTile.columns;
  }

  __device__ __forceinline__ void load_row_vectors(char* rows) {
#pragma unroll
    for (int i = 0; i < Traits::kRowLoads; ++i) {
      cp_async<kConvVectorBytes>(rows + to_ + i * kLineBytes, rows_.at(i, tap_.channel),
                                 rows_.is_valid(i));
    }
  }

  __device__ __forceinline__ void load_column_vectors(char* columns) {
    const bool is_inside = k_ < params_.source.depth;
#pragma unroll
    for (int i = 0; i < Traits::kColumnLoads; ++i) {
      if (is_beyond_tile(i)) break;
      const T* from = weight_ + int64_t{i * kLines} * params_.source.depth;
      cp_async<kConvVectorBytes>(columns + to_ + i * kLineBytes, from, is_inside && is_column(i));
    }
  }

  __device__ __forceinline__ void load_row_elements(char* rows) {
#pragma unroll  // rows_ indexed at run time would lie in local memory, and params with it
    for (int i = 0; i < Traits::kRowLoads; ++i) {
      Vector<T, kWidth> word;
      ConvTap tap = tap_;
      const T* source = rows_.locate(params_.source, i, tap);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        word.values[e] = source == nullptr ? from_float<T>(0.0f) : source[tap.channel];
        if (conv_advance(params_.source, tap, 1)) source = rows_.locate(params_.source, i, tap);
      }
      store_vector(rows + to_ + i * kLineBytes, word);
    }
  }

  __device__ __forceinline__ void load_column_elements(char* columns) {
#pragma unroll
    for (int i = 0; i < Traits::kColumnLoads; ++i) {
      if (is_beyond_tile(i)) break;
      const T* from = weight_ + int64_t{i * kLines} * params_.source.depth;
      Vector<T, kWidth> word;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const bool valid = is_column(i) && k_ + e < params_.source.depth;
        word.values[e] = valid ? from[e] : from_float<T>(0.0f);
      }
      store_vector(columns + to_ + i * kLineBytes, word);
    }
  }

  const ConvGemm& params_;
  int line_, first_column_;
  int to_;  // byte offset of the first line
  int k_;
  ConvTap tap_;
  const T* weight_;  // of the first line, at k_
  Rows rows_;
};

}  // namespace vtok
