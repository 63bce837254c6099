// alpha_blend of one value, and where a row lies in memory; shared by the CPU and the CUDA kernels.
//
//   out = alpha * a + (1 - alpha) * b,  alpha = sigmoid(factor) or factor
//   d a = alpha * g,  d b = (1 - alpha) * g,  d factor = slope * sum g * (a - b)
//   slope = alpha * (1 - alpha) for a logit, else 1
#pragma once

#include "../core/vectorized.h"
#include "alpha_blend.h"

namespace vtok {

template <typename Real>
VTOK_FUNCTION Real blend_alpha(Real factor, bool is_logit) {
  return is_logit ? sigmoid_accurate(factor) : factor;
}

template <typename Real>
VTOK_FUNCTION Real blend_slope(Real factor, bool is_logit) {
  const Real alpha = blend_alpha(factor, is_logit);
  return is_logit ? alpha * (Real(1) - alpha) : Real(1);
}

template <typename Real>
VTOK_FUNCTION Real blend_value(Real a, Real b, Real alpha) {
  return alpha * a + (Real(1) - alpha) * b;
}

struct BlendOffsets {
  int64_t of[kNumBlendTensors];
};

// Adds the offsets of position `index` in `dims`, outermost first. Index is unsigned: 32 bits where
// the position fits, because a GPU divides 64-bit integers in about 100 instructions.
template <typename Index>
VTOK_FUNCTION void add_offsets(const BlendDim* dims, int num_dims, Index index,
                               BlendOffsets& offsets) {
  for (int dim = num_dims - 1; dim >= 0; --dim) {
    const Index size = static_cast<Index>(dims[dim].size);
    const Index rest = dim == 0 ? 0 : index / size;
    const int64_t position = static_cast<int64_t>(index - rest * size);
    index = rest;
    for (int tensor = 0; tensor < kNumBlendTensors; ++tensor) {
      offsets.of[tensor] += position * dims[dim].strides[tensor];
    }
  }
}

// Element offsets of the start of a row.
VTOK_FUNCTION BlendOffsets row_offsets(const BlendLayout& layout, int64_t group, int64_t row) {
  BlendOffsets offsets{};
  if ((group | row) >> 32 == 0) {
    add_offsets(layout.group_dims, layout.num_group_dims, static_cast<uint32_t>(group), offsets);
    add_offsets(layout.row_dims, layout.num_row_dims, static_cast<uint32_t>(row), offsets);
  } else {
    add_offsets(layout.group_dims, layout.num_group_dims, static_cast<uint64_t>(group), offsets);
    add_offsets(layout.row_dims, layout.num_row_dims, static_cast<uint64_t>(row), offsets);
  }
  return offsets;
}

// First item of piece `block` when `count` items are cut into `num_blocks` pieces of equal length,
// the last ones shorter or empty.
VTOK_FUNCTION int64_t block_begin(int64_t count, int64_t num_blocks, int64_t block) {
  const int64_t begin = (count + num_blocks - 1) / num_blocks * block;
  return begin < count ? begin : count;
}

}  // namespace vtok
