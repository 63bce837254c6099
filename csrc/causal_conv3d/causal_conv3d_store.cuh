// From the sums in registers to the output.
//
//   The sums of a block pass through the shared memory of its pipeline, whose work is done: then a
//   thread finishes eight neighbouring channels with accesses of 16 bytes, and the code of the
//   epilogue exists once, in a loop. Unrolled over the registers it would be 20,000 instructions,
//   and fetching them took longer than the products of a short sum over k.
#pragma once

#include "../core/mma.cuh"
#include "causal_conv3d_epilogue.cuh"

namespace vtok {

// How the sums lie in shared memory: rows of floats, in octets. Octet o of row r lies at o ^ (r %
// 8), since a warp writes pairs of eight rows at a time.
template <typename Traits>
struct ConvStaging {
  static constexpr int kColumns = Traits::kTile.columns;
  static constexpr int kOctets = kColumns / 8;
  static constexpr int kSwizzle = kOctets < 8 ? kOctets - 1 : 7;
  static constexpr int kStagesBytes = Traits::kTile.stages * Traits::kStageBytes;
  static constexpr int kSumsBytes = Traits::kTile.rows * kColumns * static_cast<int>(sizeof(float));
  static constexpr int kPasses = kSumsBytes <= kStagesBytes ? 1 : 2;
  static constexpr int kPassRows = Traits::kTile.rows / kPasses;
  static constexpr int kPassBlocks = Traits::kWarpRows / kPasses;  // a warp's tiles of 16 rows
  static_assert(kSumsBytes <= kPasses * kStagesBytes && Traits::kWarpRows % kPasses == 0,
                "a pass fits");
  static_assert((kOctets & (kOctets - 1)) == 0, "octets are swizzled by exclusive or");

  // Row of the tile that row `local` of a pass is: of each warp's rows the pass's share.
  static __device__ __forceinline__ int tile_row(int local, int pass) {
    constexpr int kShare = kPassBlocks * 16;
    return kPasses == 1 ? local
                        : local / kShare * kShare * kPasses + pass * kShare + local % kShare;
  }

  // First row, in the pass, of a warp's tile `block`.
  static __device__ __forceinline__ int local_row(int block, int pass) {
    return kPasses == 1 ? Traits::warp_row() + block * Traits::kBlockDistance
                        : Traits::warp_row() / kPasses + (block - pass * kPassBlocks) * 16;
  }

  static __device__ __forceinline__ float* octet(char* shared, int row, int index) {
    return reinterpret_cast<float*>(shared) + row * kColumns + (index ^ (row & kSwizzle)) * 8;
  }

  // Where the table of output offsets lies: behind the stages.
  static __device__ __forceinline__ int64_t* offsets(char* shared) {
    return reinterpret_cast<int64_t*>(shared + kStagesBytes);
  }
};

// Writes the table of a block's rows: the offset of channel 0 of all groups in the output or, with
// splits, in the partial sums; -1 where there is no position. The main loop's barriers follow.
template <typename Traits>
__device__ __forceinline__ void conv_place_rows(const ConvGemm& params, int first_row,
                                                char* shared) {
  int64_t* offsets = ConvStaging<Traits>::offsets(shared);
  for (int row = threadIdx.x; row < Traits::kTile.rows; row += Traits::kThreads) {
    const int position = first_row + row;
    int64_t offset = -1;
    if (position < params.source.positions) {
      offset = params.splits > 1
                   ? (int64_t{blockIdx.z} * params.source.positions + position) *
                         params.source.groups * params.columns
                   : conv_output_offset(params.source, params.epilogue.strides, position);
    }
    offsets[row] = offset;
  }
}

// Finishes the octet of sums at `from` for channels from `channel` (of all groups) on, `count` of
// which exist; `at` is their offset.
template <typename T>
__device__ __forceinline__ void conv_finish_octet(const ConvGemm& params, float mix, int channel,
                                                  int count, int64_t at, const float* from) {
  constexpr int kWide = 16 / sizeof(T);
  using Quad = Vector<float, 4>;
  const Quad low = load_vector<Quad>(from), high = load_vector<Quad>(from + 4);
  if (params.splits > 1) {
    if (params.columns % 4 == 0) {
      store_vector(params.partial + at, low);
      if (count > 4) store_vector(params.partial + at + 4, high);
    } else {
      for (int e = 0; e < count; ++e) params.partial[at + e] = from[e];
    }
  } else if (params.wide) {
    float sums[kWide];
#pragma unroll
    for (int first = 0; first < 8; first += kWide) {
      if (first >= count) break;
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        sums[e] = first + e < 4 ? low.values[(first + e) % 4] : high.values[(first + e) % 4];
      }
      conv_finish<T>(params.epilogue, mix, channel + first, at + first, sums);
    }
  } else {
#pragma unroll 1
    for (int e = 0; e < count; ++e)
      conv_finish<T>(params.epilogue, mix, channel + e, at + e, {from[e]});
  }
}

// Hands the sums on: to the epilogue, or as partial sums.
template <typename T, typename Traits>
__device__ __forceinline__ void conv_store(
    const ConvGemm& params, int first_column, int group,
    const float (&sums)[Traits::kWarpRows][Traits::kWarpColumns][4], char* shared) {
  using Staging = ConvStaging<Traits>;
  const int lane_row = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  const float mix = conv_mix(params.epilogue);
  cp_async_wait_all();
#pragma unroll 1
  for (int pass = 0; pass < Staging::kPasses; ++pass) {
    __syncthreads();  // nobody reads the stages, or the pass before, any more
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows; ++i) {
      if (Staging::kPasses > 1 && i / Staging::kPassBlocks != pass) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Staging::local_row(i, pass) + half * 8 + lane_row;
#pragma unroll
        for (int j = 0; j < Traits::kWarpColumns; ++j) {
          const Vector<float, 2> values = {{sums[i][j][half * 2], sums[i][j][half * 2 + 1]}};
          store_vector(Staging::octet(shared, row, Traits::warp_column() / 8 + j) + pair, values);
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < Staging::kPassRows * Staging::kOctets;
         item += Traits::kThreads) {
      const int row = item / Staging::kOctets, octet = item % Staging::kOctets;
      const int64_t offset = Staging::offsets(shared)[Staging::tile_row(row, pass)];
      const int column = first_column + octet * 8;
      if (offset < 0 || column >= params.columns) continue;
      const int channel = group * params.columns + column;
      const int count = params.columns - column < 8 ? params.columns - column : 8;
      conv_finish_octet<T>(params, mix, channel, count, offset + channel,
                           Staging::octet(shared, row, octet));
    }
  }
}

}  // namespace vtok
