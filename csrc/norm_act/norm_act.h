// Normalisation of video tensors [B, C, T, H, W] in channels_last_3d memory, with optional
// x * sigmoid(x) and cast, written into the padded buffer that the next convolution reads.
//
//   layer, rms           statistics over the C values of one position
//   group, group_rms     statistics over C / groups channels and all positions of one frame
//
// A "row" is the C contiguous values of one position. Rows are numbered b, t, h, w, w fastest.
// The arithmetic is in norm_act_math.h.
#pragma once

#include <cstdint>

#include "../core/stream.h"
#include "../core/tensor_view.h"

namespace vtok {

constexpr int kNormActMaxDims = 4;

enum class NormKind { kLayer = 0, kRms = 1, kGroup = 2, kGroupRms = 3 };

// Where rows lie in x and in y. Dimensions that both tensors allow are merged, size 1 is dropped.
struct NormActRows {
  int num_dims;  // outermost first
  int64_t sizes[kNormActMaxDims];
  int64_t x_strides[kNormActMaxDims];  // in elements
  int64_t y_strides[kNormActMaxDims];
  uint32_t multipliers[kNormActMaxDims];  // division of a row number by sizes[dim], see
  uint32_t shifts[kNormActMaxDims];       // Note [Division by multiplication]
  int frame_dim;     // the dimension of frames, -1 unless y starts with copies of frame 0
  int64_t y_offset;  // of row 0 of x in y: the frames in front
  int64_t num_rows;  // below 2^31
};

// y is [batch, front + frames, height + bottom, width + right, C], dense. Row (b, t, h, w) of x
// goes to frame front + t. The first `front` frames hold zeros, copies of frame 0 or `state`; the
// bottom rows and right columns hold zeros.
struct NormActBuffer {
  int64_t batch, front, frames, height, width, bottom, right;
  bool replicate;
  int64_t frame_stride;  // elements of one frame of y
};

struct NormActLayout {
  NormActRows rows;
  NormActBuffer buffer;
  NormKind kind;
  int64_t channels;
  int64_t num_groups;  // 1 for layer and rms
  int64_t rows_per_frame;
  double eps;
  bool act;
};

struct NormActForward {
  NormActLayout layout;
  TensorView x;             // [B, C, T, H, W], channel stride 1
  TensorView weight;        // [C] contiguous, floating, or absent
  TensorView bias;          // [C] contiguous, floating, or absent
  TensorView state;         // [B, C, front, H, W] dense channels_last_3d, dtype of y, or absent
  OutputView y;             // [B, C, front + T, H + bottom, W + right] channels_last_3d
  OutputView stats;         // mean and 1 / deviation: [B, T, groups, 2], or per position
                            // [B, T, H * W, 2] (layer, rms; may be absent)
  WorkspaceView workspace;  // float32, norm_act_workspace_*() elements
  int num_threads;
};

struct NormActBackward {
  NormActLayout layout;
  TensorView grad_y;       // as y
  TensorView x;            // [B, C, T, H, W], channel stride 1
  TensorView weight;       // [C] contiguous, floating, or absent
  TensorView bias;         // [C] contiguous, floating, or absent
  TensorView stats;        // as the forward pass left them; absent: found again (layer, rms)
  OutputView grad_x;       // dense channels_last_3d, dtype of x, or absent
  OutputView grad_weight;  // [C], or absent
  OutputView grad_bias;    // [C], or absent
  WorkspaceView workspace;
  int num_threads;
};

void norm_act_forward_cpu(const NormActForward& params);
void norm_act_backward_cpu(const NormActBackward& params);
void norm_act_forward_cuda(const NormActForward& params, Stream stream);
void norm_act_backward_cuda(const NormActBackward& params, Stream stream);

// float32 elements of workspace that a call needs.
int64_t norm_act_workspace_cpu(const NormActLayout& layout, bool backward);
int64_t norm_act_workspace_cuda(const NormActLayout& layout, bool backward, int device_index);

inline bool is_grouped(NormKind kind) {
  return kind == NormKind::kGroup || kind == NormKind::kGroupRms;
}

inline bool subtracts_mean(NormKind kind) {
  return kind == NormKind::kLayer || kind == NormKind::kGroup;
}

}  // namespace vtok
