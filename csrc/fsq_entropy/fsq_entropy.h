// Entropy of FSQ assignments: what the CPU and the CUDA kernels are told.
//
// Note [Two halves of a codebook]
// A code is one level per channel, and its probability is the product of the levels' ones. Channels
// [0, num_low) form the low half with K1 combinations, the rest the high half with K2: the
// distribution of a token over K1 * K2 codes is the outer product of low [K1] and high [K2], and
// the average over T tokens is the GEMM high^T low / T = [K2, K1], in the order of the codebook
// (the first channel is the least significant). Nothing of size tokens x codebook exists. Gradients
// come back the same way: with G = d loss / d average, grad_low = high G / T, grad_high = low G^T /
// T. The GEMMs are torch's; the kernels here do what surrounds them.
#pragma once

#include "../fsq/fsq.h"

namespace vtok {

// Largest sum of the level counts: a codebook below 2^30 has at most 3 * 256 + 64.
constexpr int kFsqEntropyMaxLevelSum = 1024;
// Elements of the average distribution whose entropy is one partial sum: a sum does not depend on
// how they are spread over threads.
constexpr int kFsqEntropyPartial = 1024;

struct FsqEntropyLayout {
  int64_t num_codebooks;
  int64_t num_tokens;  // of one codebook
  int channels;
  int num_low;
  int low_size;   // K1
  int high_size;  // K2
  int level_sum;
  // Logit difference of neighbouring levels per z: 2 * inverse_temperature / half_width.
  double slope_per_z[kFsqMaxChannels];
  int level_offset[kFsqMaxChannels];     // of a channel in tables of all levels
  uint32_t reciprocal[kFsqMaxChannels];  // ceil(2^32 / levels)
  FsqChannel channel[kFsqMaxChannels];
};

// Strides in elements of the codebook and the token dimension; the last dimension of low, high and
// their gradients is contiguous, that of z has `channel`.
struct FsqEntropyStrides {
  int64_t codebook, token, channel;
};

inline FsqEntropyStrides fsq_entropy_strides(const TensorView& view) {
  return {view.strides[0], view.strides[1], view.num_dims > 2 ? view.strides[2] : 0};
}

// Views with a null pointer are not computed. "Real" is float, or double for float64 z.
struct FsqEntropyFactors {
  FsqEntropyLayout layout;
  TensorView z;           // [codebooks, T, D] floating
  OutputView low;         // [codebooks, T, K1] Real
  OutputView high;        // [codebooks, T, K2] Real
  OutputView entropy;     // [codebooks, T] Real, without clamp, or null
  OutputView commitment;  // [codebooks, T] Real, sum over channels of (z - code)^2, or null
  OutputView indices;     // [codebooks, T] int32 of the nearest code, -1 for NaN, or null
  int num_threads;
};

struct FsqEntropyBackward {
  FsqEntropyLayout layout;
  TensorView z;                // [codebooks, T, D] floating
  TensorView grad_low;         // [codebooks, T, K1] Real, or null (grad_high too)
  TensorView grad_high;        // [codebooks, T, K2] Real
  TensorView grad_entropy;     // [] Real, of every token's unclamped entropy, or null
  TensorView grad_commitment;  // [] Real, of every token's commitment, or null
  OutputView grad_z;           // [codebooks, T, D] as z
  int num_threads;
};

// Entropy with the logarithm's argument clamped, streamed over the codebook.
struct FsqEntropyClampedForward {
  int64_t num_codebooks, num_tokens;
  int low_size, high_size;
  TensorView low;      // [codebooks, T, K1] Real
  TensorView high;     // [codebooks, T, K2] Real
  OutputView entropy;  // [codebooks, T] Real
  int num_threads;
};

struct FsqEntropyClampedBackward {
  int64_t num_codebooks, num_tokens;
  int low_size, high_size;
  TensorView low;           // [codebooks, T, K1] Real
  TensorView high;          // [codebooks, T, K2] Real
  TensorView grad_entropy;  // [] Real, of every token's entropy
  OutputView grad_low;      // [codebooks, T, K1] Real
  OutputView grad_high;     // [codebooks, T, K2] Real
  int num_threads;
};

struct FsqEntropyAverageForward {
  TensorView average;          // [K] Real
  OutputView partial_entropy;  // [ceil(K / kFsqEntropyPartial)] Real
  int num_threads;
};

struct FsqEntropyAverageBackward {
  TensorView average;       // [K] Real
  TensorView grad_entropy;  // [] Real
  OutputView grad_average;  // [K] Real
  int num_threads;
};

void fsq_entropy_factors_cpu(const FsqEntropyFactors& params);
void fsq_entropy_backward_cpu(const FsqEntropyBackward& params);
void fsq_entropy_clamped_forward_cpu(const FsqEntropyClampedForward& params);
void fsq_entropy_clamped_backward_cpu(const FsqEntropyClampedBackward& params);
void fsq_entropy_average_forward_cpu(const FsqEntropyAverageForward& params);
void fsq_entropy_average_backward_cpu(const FsqEntropyAverageBackward& params);

void fsq_entropy_factors_cuda(const FsqEntropyFactors& params, Stream stream);
void fsq_entropy_backward_cuda(const FsqEntropyBackward& params, Stream stream);
void fsq_entropy_clamped_forward_cuda(const FsqEntropyClampedForward& params, Stream stream);
void fsq_entropy_clamped_backward_cuda(const FsqEntropyClampedBackward& params, Stream stream);
void fsq_entropy_average_forward_cuda(const FsqEntropyAverageForward& params, Stream stream);
void fsq_entropy_average_backward_cuda(const FsqEntropyAverageBackward& params, Stream stream);

}  // namespace vtok
