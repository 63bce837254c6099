// Finite scalar quantization (FSQ): what the CPU and the CUDA kernels are told. The arithmetic is
// in fsq_math.h.
//
// A call quantizes `num_tokens` vectors of `channels` values. Tokens are addressed by up to six
// dimensions, because z may have any strides: [..., D], [B, D, T, H, W], several codebooks, or a
// slice of a larger buffer.
#pragma once

#include <cstdint>

#include "../core/stream.h"
#include "../core/tensor_view.h"

namespace vtok {

constexpr int kFsqMaxChannels = 16;
constexpr int kFsqMaxTokenDims = 6;

// Up to this many levels a value is compared with the level boundaries; beyond it tanh is computed.
constexpr int kFsqMaxCompared = 16;

struct FsqChannel {
  float shift;         // atanh(offset / half)
  float half;          // (levels - 1) * (1 + 1e-3) / 2
  float offset;        // 0.5 for even levels, else 0
  int32_t half_width;  // levels / 2, integer division
  int32_t levels;
  int64_t basis;  // product of the levels of the channels before: channel 0 is least significant
  float inverse_half_width;  // 1 / half_width
  float slope;               // half / half_width
  // Values of z at which the level grows by one, ascending; +infinity beyond levels - 1 of them.
  float boundary[kFsqMaxCompared - 1];
  // -boundary * 2^64, see Note [Steps by saturation] in fsq_cuda.cu.
  float scaled_boundary[kFsqMaxCompared - 1];
};

// Sizes and strides (in elements) of the token dimensions, outermost first.
struct FsqTokens {
  int num_dims;
  int64_t sizes[kFsqMaxTokenDims];
  int64_t z_strides[kFsqMaxTokenDims];
  int64_t code_strides[kFsqMaxTokenDims];
  int64_t index_strides[kFsqMaxTokenDims];
  int64_t num_tokens;
};

struct FsqLayout {
  FsqTokens tokens;
  int channels;
  int64_t z_channel_stride;
  int64_t code_channel_stride;
  FsqChannel channel[kFsqMaxChannels];
};

struct FsqForward {
  FsqLayout layout;
  TensorView z;        // [..., D, ...] floating
  OutputView codes;    // as z
  OutputView indices;  // z without the channel dimension, int32 or int64
  int num_threads;
};

// In the backward pass "z strides" address z and "code strides" address both gradients.
struct FsqBackward {
  FsqLayout layout;
  TensorView z;           // [..., D, ...] floating
  TensorView grad_codes;  // as z, same dtype
  OutputView grad_z;      // as z, same strides as grad_codes
  int num_threads;
};

// "z strides" are unused.
struct FsqDecode {
  FsqLayout layout;
  TensorView indices;  // [...] int32 or int64
  OutputView codes;    // [..., D, ...] floating
  int num_threads;
};

void fsq_forward_cpu(const FsqForward& params);
void fsq_backward_cpu(const FsqBackward& params);
void fsq_decode_cpu(const FsqDecode& params);

void fsq_forward_cuda(const FsqForward& params, Stream stream);
void fsq_backward_cuda(const FsqBackward& params, Stream stream);
void fsq_decode_cuda(const FsqDecode& params, Stream stream);

}  // namespace vtok
