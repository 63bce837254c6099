// alpha_blend: out = alpha * a + (1 - alpha) * b. What the CPU and the CUDA kernels are told; the
// arithmetic is in alpha_blend_math.h.
//
// Note [Groups, rows, runs]
// The factor may be a scalar, per channel, per frame or any shape that broadcasts to a. After
// merging, the elements are
//   groups   outer dimensions along which the factor changes,
//   rows     outer dimensions that share a factor,
//   runs     the innermost dimension in memory: all of a run shares a factor, or
//   (`run_has_factors`,
//            per-channel factors in channels_last memory) each position has its own.
// The gradient of a factor is a sum over a group's rows and, unless `run_has_factors`, its runs. A
// group is cut into `num_blocks` pieces whose number depends on the sizes only; each piece yields
// one partial sum per factor of the group, and these are added in a fixed order.
#pragma once

#include <cstdint>

#include "../core/stream.h"
#include "../core/tensor_view.h"

namespace vtok {

// Tensors of a call, in the order of BlendLayout::strides. `kBlendOut` is out or its gradient.
enum BlendTensor { kBlendA, kBlendB, kBlendOut, kBlendGradA, kBlendGradB, kBlendFactor };
constexpr int kNumBlendTensors = 6;

// Elements per block of the reduction: 16 K values of three tensors (192 KB in float32) stay in an
// L2 cache, and 2^10 blocks fill a GPU while their partial sums stay few.
constexpr int64_t kBlendBlockElements = 16384;
constexpr int64_t kBlendMaxBlocks = 1024;

struct BlendDim {
  int64_t size;
  int64_t strides[kNumBlendTensors];
};

struct BlendLayout {
  int num_group_dims;
  int num_row_dims;
  BlendDim group_dims[kMaxDims];
  BlendDim row_dims[kMaxDims];
  BlendDim run;
  int64_t num_groups;
  int64_t num_rows;    // per group
  int64_t num_blocks;  // per group
  bool run_has_factors;
  bool is_logit;  // alpha = sigmoid(factor), else alpha = factor
};

struct BlendForward {
  BlendLayout layout;
  TensorView a;       // [...] floating
  TensorView b;       // as a
  TensorView factor;  // broadcasts to a; float32, or float64 when a is float64
  OutputView out;     // as a
  int num_threads;
};

// A gradient that nobody needs has a null pointer.
struct BlendBackward {
  BlendLayout layout;
  TensorView grad_out;     // [...] as a
  TensorView a;            // [...], absent without grad_factor
  TensorView b;            // as a
  TensorView factor;       // as in BlendForward, contiguous
  OutputView grad_a;       // as a
  OutputView grad_b;       // as a
  OutputView grad_factor;  // as factor, contiguous
  WorkspaceView partials;  // [num_groups, num_blocks, factors of a run], dtype of factor
  int num_threads;
};

void alpha_blend_forward_cpu(const BlendForward& params);
void alpha_blend_backward_cpu(const BlendBackward& params);

void alpha_blend_forward_cuda(const BlendForward& params, Stream stream);
void alpha_blend_backward_cuda(const BlendBackward& params, Stream stream);

}  // namespace vtok
