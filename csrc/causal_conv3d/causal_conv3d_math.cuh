// The arithmetic of one warp, for each number format, on tiles in shared memory.
//
// Note [One layout for all formats]
// A tile row is 64 bytes along k: 32 half or 16 float values, as four vectors of 16 bytes. Vector v
// of row r lies at v ^ (r / 2 % 4): eight rows of one vector then hit all banks once. ldmatrix
// moves 16-bit pairs, but a matrix of 8 rows x 16 bytes is just as well 8 x 4 tf32 values in the
// very registers that mma wants; so half and tf32 share every index.
#pragma once

#include "../core/half.h"
#include "../core/launch.cuh"
#include "../core/mma.cuh"
#include "causal_conv3d.h"

namespace vtok {

constexpr int kConvVectorBytes = 16;
constexpr int kConvRowVectors = 4;
constexpr int kConvRowBytes = kConvVectorBytes * kConvRowVectors;

// Byte offset of vector `vector` in row `row` of a tile.
__device__ __forceinline__ int conv_swizzle(int row, int vector) {
  return row * kConvRowBytes + ((vector ^ ((row >> 1) & 3)) * kConvVectorBytes);
}

template <ConvMath kMath>
struct ConvElement {
  using type = float;
};
template <>
struct ConvElement<ConvMath::kBFloat16> {
  using type = bfloat16;
};
template <>
struct ConvElement<ConvMath::kFloat16> {
  using type = float16;
};

// sums += a tile * b tile^T over one tile depth. A warp owns kRows x 16 rows from `row` and
// kColumns x 8 columns from `column`; sums are laid out as mma's d, see core/mma.cuh.
template <ConvMath kMath, int kRows, int kColumns>
__device__ __forceinline__ void conv_multiply_tensor_core(float (&sums)[kRows][kColumns][4],
                                                          const char* a_tile, const char* b_tile,
                                                          int row, int column) {
  static_assert(kColumns % 2 == 0, "ldmatrix_x4 loads b for 16 columns");
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int line = lane % 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[kRows][4];
    uint32_t b[kColumns / 2][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = row + i * 16 + (matrix & 1) * 8 + line;
      ldmatrix_x4(a[i], a_tile + conv_swizzle(r, half * 2 + (matrix >> 1)));
    }
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) {
      const int r = column + j * 16 + (matrix >> 1) * 8 + line;
      ldmatrix_x4(b[j], b_tile + conv_swizzle(r, half * 2 + (matrix & 1)));
    }
    if constexpr (kMath == ConvMath::kTf32) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = float_to_tf32(bits_to_float(a[i][e]));
      }
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j][e] = float_to_tf32(bits_to_float(b[j][e]));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        if constexpr (kMath == ConvMath::kTf32) {
          mma_m16n8k8_tf32(sums[i][j], a[i], pair);
        } else {
          mma_m16n8k16<typename ConvElement<kMath>::type>(sums[i][j], a[i], pair);
        }
      }
    }
  }
}

// The same in exact float32: a thread multiplies for the elements that mma would give it.
template <int kRows, int kColumns>
__device__ __forceinline__ void conv_multiply_float(float (&sums)[kRows][kColumns][4],
                                                    const char* a_tile, const char* b_tile, int row,
                                                    int column) {
  using Word = Vector<float, 4>;
  const int group = threadIdx.x % 32 / 4;
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int vector = 0; vector < kConvRowVectors; ++vector) {
    Word b[kColumns][2];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = column + j * 8 + member * 2 + e;
        b[j][e] = load_vector<Word>(b_tile + conv_swizzle(r, vector));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Word a =
            load_vector<Word>(a_tile + conv_swizzle(row + i * 16 + half * 8 + group, vector));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = sums[i][j][half * 2 + e];
#pragma unroll
            for (int k = 0; k < 4; ++k) sum = __fmaf_rn(a.values[k], b[j][e].values[k], sum);
          }
        }
      }
    }
  }
}

}  // namespace vtok
