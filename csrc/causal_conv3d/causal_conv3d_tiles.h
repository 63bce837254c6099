// Tile shapes of the convolution kernels, and which of them a shape gets.
//
// The choice is a table for each kind of products: bench/tune_causal_conv3d.py measures every tile
// for the shapes of the models on a GPU and rewrites the rows between the markers. The rows of
// mma.sync have not been measured on an Ampere GPU: they follow from reuse (a tile of m x n values
// loads m + n of them per step) and from filling the GPU.
#pragma once

#include <cstdint>

namespace vtok {

struct ConvTile {
  int rows, columns;            // output positions and channels of a block
  int warp_rows, warp_columns;  // of a warp
  int stages;                   // of the pipeline through shared memory

  constexpr int threads() const { return rows / warp_rows * (columns / warp_columns) * 32; }
  // The stages, and the offset of every row in the output.
  constexpr int shared_bytes() const { return (rows + columns) * 64 * stages + rows * 8; }
};

constexpr ConvTile kConvTiles[] = {
    {256, 128, 64, 64, 4},  // 0
    {128, 128, 64, 32, 4},  // 1
    {128, 64, 32, 32, 4},   // 2
    {64, 64, 32, 32, 4},    // 3
    {128, 16, 32, 16, 4},   // 4  few output channels: pictures and latents
};
constexpr int kNumConvTiles = sizeof(kConvTiles) / sizeof(kConvTiles[0]);

// Tiles whose products are wgmma's: 64 x columns of a warpgroup, on sm_90a in half formats. Their
// indices follow those of kConvTiles.
struct ConvWarpgroupTile {
  int rows, columns;  // output positions and channels of a block
  int warpgroups;     // below each other
  int stages;         // of the pipeline through shared memory
  int blocks;         // that share a multiprocessor

  constexpr int threads() const { return warpgroups * 128; }
  // Operand tiles start at multiples of 1024 bytes, see Note [Operand tiles of wgmma].
  constexpr int shared_bytes() const { return (rows + columns) * 128 * stages + rows * 8 + 1024; }
};

constexpr ConvWarpgroupTile kConvWarpgroupTiles[] = {
    {128, 256, 2, 4, 1},  // 5
    {256, 128, 2, 4, 1},  // 6
    {128, 128, 2, 3, 2},  // 7
    {64, 64, 1, 4, 3},    // 8
    {256, 128, 4, 4, 1},  // 9
};
constexpr int kNumConvWarpgroupTiles = sizeof(kConvWarpgroupTiles) / sizeof(kConvWarpgroupTiles[0]);

// Blocks of the weight's gradient: output channels x (tap, channel); rows are positions.
constexpr ConvTile kConvGradientTiles[] = {
    {128, 128, 64, 32, 4},  // 0
    {64, 64, 32, 32, 4},    // 1
};
constexpr int kNumConvGradientTiles = sizeof(kConvGradientTiles) / sizeof(kConvGradientTiles[0]);

// The same with wgmma; a step is 64 positions.
constexpr ConvWarpgroupTile kConvGradientWarpgroupTiles[] = {
    {128, 256, 2, 4, 1},  // 2
    {128, 128, 2, 3, 2},  // 3
    {64, 128, 1, 4, 2},   // 4
};
constexpr int kNumConvGradientWarpgroupTiles =
    sizeof(kConvGradientWarpgroupTiles) / sizeof(kConvGradientWarpgroupTiles[0]);
// Whether they are chosen: not before they have been measured on a GPU.
constexpr bool kConvGradientWarpgroupsMeasured = false;

constexpr int conv_gradient_tile_rows(int tile) {
  return tile < kNumConvGradientTiles
             ? kConvGradientTiles[tile].rows
             : kConvGradientWarpgroupTiles[tile - kNumConvGradientTiles].rows;
}
constexpr int conv_gradient_tile_columns(int tile) {
  return tile < kNumConvGradientTiles
             ? kConvGradientTiles[tile].columns
             : kConvGradientWarpgroupTiles[tile - kNumConvGradientTiles].columns;
}

struct ConvTileRow {
  int most_columns;     // the row is for at most so many output channels (per group)
  int64_t most_blocks;  // and at most so many blocks of 64 x 64 per multiprocessor
  int tile;
};

// The first row that fits counts.
constexpr ConvTileRow kConvTileTable[] = {
    // <tuned mma>
    {16, INT64_MAX, 4}, {64, 4, 3},         {64, INT64_MAX, 2},        {INT32_MAX, 4, 3},
    {INT32_MAX, 8, 2},  {INT32_MAX, 32, 1}, {INT32_MAX, INT64_MAX, 0},
    // </tuned mma>
};
// {0, 0, 0} fits nothing: this loader and this epilogue have not run on a GPU yet.
constexpr ConvTileRow kConvWarpgroupTable[] = {
    // <tuned wgmma>
    {0, 0, 0},
    // </tuned wgmma>
};
// With fewer output channels half of a tile's products or more are of no use. The kind of products
// must not depend on the number of positions: streams have the same bits for any chunks.
constexpr int kLeastWarpgroupColumns = 33;

// Tile for a product of `positions` rows and `columns` columns on `multiprocessors`. Exact float32
// has the tiles whose accumulators leave registers for its operands.
inline int choose_conv_tile(int64_t positions, int64_t columns, int groups, int multiprocessors,
                            bool is_float32, bool has_warpgroups) {
  const int64_t blocks = (positions + 63) / 64 * ((columns + 63) / 64) * groups / multiprocessors;
  const auto fits = [&](const ConvTileRow& row) {
    return columns <= row.most_columns && blocks <= row.most_blocks;
  };
  if (has_warpgroups && columns >= kLeastWarpgroupColumns) {
    for (const ConvTileRow& row : kConvWarpgroupTable) {
      if (fits(row)) return row.tile;
    }
  }
  for (const ConvTileRow& row : kConvTileTable) {
    if (fits(row)) return is_float32 && row.tile < 2 ? 2 : row.tile;
  }
  return 3;
}

// Output positions and channels of a block of tile `tile`, an index into both lists.
constexpr int conv_tile_rows(int tile) {
  return tile < kNumConvTiles ? kConvTiles[tile].rows
                              : kConvWarpgroupTiles[tile - kNumConvTiles].rows;
}
constexpr int conv_tile_columns(int tile) {
  return tile < kNumConvTiles ? kConvTiles[tile].columns
                              : kConvWarpgroupTiles[tile - kNumConvTiles].columns;
}

}  // namespace vtok
