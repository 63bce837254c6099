// temporal_resample: half or twice as many frames, optionally blended with a second branch. What
// the CPU and the CUDA kernels are told; which frame depends on which is in
// temporal_resample_math.h.
//
//   out[t] = value[t], or alpha * value[t] + (1 - alpha) * y[t],  value[t] = sum_k w_k(t) *
//   v[f_k(t)]
//
// Note [Source frames]
// v is `carried` (frames kept from the preceding chunk of a stream) followed by x; frame i of v has
// the source number i. A buffer made for a convolution starts with `num_padding` frames of context:
// zeros, copies of v[0], or the frames of the tensor `front`, whose frame j has the source number
// -1 - j. A mean of three frames has its single padding frame in front of v instead.
#pragma once

#include <cstdint>

#include "../core/stream.h"
#include "../core/tensor_view.h"

namespace vtok {

enum class ResampleMode {
  kMeanOfThree,  // windows of 3 frames, stride 2
  kNearest,      // every frame twice
  kLinear,       // half-pixel centres, within segments
};

// Tensors of a call, in the order of the strides; `kResampleOut` is out or its gradient.
enum ResampleTensor {
  kResampleX,
  kResampleCarried,
  kResampleFront,
  kResampleY,
  kResampleOut,
  kResampleGradX,
  kResampleGradCarried,
  kResampleGradFront,
  kResampleGradY
};
constexpr int kNumResampleTensors = 9;
constexpr int kResampleMaxDims = 4;     // B, C, H, W
constexpr int kResampleMaxPadding = 4;  // frames in front of a convolution of up to 5 frames

// Partial sums of the factor's gradient: one per piece of pixels on the CPU, one per block and
// kResampleFrames output frames on CUDA, so that the workspace is bounded by the shape alone.
constexpr int64_t kResamplePieces = 1024;
constexpr int kResampleThreads = 256;
constexpr int kResampleFrames = 8;

struct ResampleTiming {
  ResampleMode mode;
  int num_padding;  // frames in front, see Note [Source frames]
  bool replicate;   // padding frames are copies of v[0], else zeros
  bool has_front;   // padding frames come from `front`
  int num_carried;  // frames of v that come from `carried`
  int num_sources;  // frames of v
  int segment;      // linear: v[:segment] and v[segment:] are interpolated apart
  int skip;         // linear: leading upsampled frames that an earlier chunk has returned
  int num_outputs;
};

// One spatial, channel or batch dimension.
struct ResampleDim {
  int64_t size;
  int64_t strides[kNumResampleTensors];
};

// Pixels are the positions in [B, C, H, W]: `outer` dimensions and a run, innermost in memory.
struct ResampleLayout {
  ResampleTiming timing;
  int num_outer;
  ResampleDim outer[kResampleMaxDims];
  ResampleDim run;
  int64_t frame_strides[kNumResampleTensors];
  int64_t num_pixels;
  bool is_blend;
};

struct ResampleForward {
  ResampleLayout layout;
  TensorView x;        // [B, C, T, H, W] floating
  TensorView carried;  // [B, C, num_carried, H, W] as x, or absent
  TensorView front;    // [B, C, num_padding, H, W] as x, or absent
  TensorView y;        // as out, absent without blend
  TensorView factor;   // [] logit; float32, or float64 when x is float64; absent without blend
  OutputView out;      // [B, C, num_outputs, H, W] as x
  int num_threads;
};

// A gradient that nobody needs has a null pointer. x, carried and y are present only with
// grad_factor.
struct ResampleBackward {
  ResampleLayout layout;
  TensorView grad_out;  // [B, C, num_outputs, H, W] floating
  TensorView x;
  TensorView carried;
  TensorView y;
  TensorView factor;
  OutputView grad_x;
  OutputView grad_carried;
  OutputView grad_front;
  OutputView grad_y;
  OutputView grad_factor;  // []
  WorkspaceView partials;  // [n], dtype of factor
  int num_threads;
};

void temporal_resample_forward_cpu(const ResampleForward& params);
void temporal_resample_backward_cpu(const ResampleBackward& params);

void temporal_resample_forward_cuda(const ResampleForward& params, Stream stream);
void temporal_resample_backward_cuda(const ResampleBackward& params, Stream stream);

}  // namespace vtok
