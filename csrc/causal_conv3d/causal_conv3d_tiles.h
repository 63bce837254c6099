// Tile shapes of the convolution kernels, and which of them a shape gets.
//
// The choice is a table: bench/tune_causal_conv3d.py measures every tile for the shapes of the
// models on a GPU and rewrites the rows between the markers. No row has been measured yet: these
// follow from reuse (a tile of m x n values loads m + n of them per step) and from filling the GPU.
#pragma once

#include <cstdint>

namespace vtok {

struct ConvTile {
  int rows, columns;            // output positions and channels of a block
  int warp_rows, warp_columns;  // of a warp
  int stages;                   // of the pipeline through shared memory

  constexpr int threads() const { return rows / warp_rows * (columns / warp_columns) * 32; }
  constexpr int shared_bytes() const { return (rows + columns) * 64 * stages; }
};

constexpr ConvTile kConvTiles[] = {
    {256, 128, 64, 64, 4},  // 0
    {128, 128, 64, 32, 4},  // 1
    {128, 64, 32, 32, 4},   // 2
    {64, 64, 32, 32, 4},    // 3
    {128, 16, 32, 16, 4},   // 4  few output channels: pictures and latents
};
constexpr int kNumConvTiles = sizeof(kConvTiles) / sizeof(kConvTiles[0]);

// Blocks of the weight's gradient: output channels x (tap, channel); rows are positions.
constexpr ConvTile kConvGradientTiles[] = {
    {128, 128, 64, 32, 4},  // 0
    {64, 64, 32, 32, 4},    // 1
};
constexpr int kNumConvGradientTiles = sizeof(kConvGradientTiles) / sizeof(kConvGradientTiles[0]);

struct ConvTileRow {
  int most_columns;     // the row is for at most so many output channels (per group)
  int64_t most_blocks;  // and at most so many blocks of 64 x 64 per multiprocessor
  int tile;
};

// The first row that fits counts.
constexpr ConvTileRow kConvTileTable[] = {
    // <tuned>
    {16, INT64_MAX, 4}, {64, 4, 3},         {64, INT64_MAX, 2},        {INT32_MAX, 4, 3},
    {INT32_MAX, 8, 2},  {INT32_MAX, 32, 1}, {INT32_MAX, INT64_MAX, 0},
    // </tuned>
};

// Tile for a product of `positions` rows and `columns` columns on `multiprocessors`. Exact float32
// has the tiles whose accumulators leave registers for its operands.
inline int choose_conv_tile(int64_t positions, int64_t columns, int groups, int multiprocessors,
                            bool is_float32) {
  const int64_t blocks = (positions + 63) / 64 * ((columns + 63) / 64) * groups;
  for (const ConvTileRow& row : kConvTileTable) {
    if (columns <= row.most_columns && blocks / multiprocessors <= row.most_blocks) {
      return is_float32 && row.tile < 2 ? 2 : row.tile;
    }
  }
  return 3;
}

}  // namespace vtok
