// Residual tokens by attention: what the CPU and the CUDA kernels are told. The arithmetic is in
// residual_pool_math.h.
//
//   z[n] = frame[n] - key[n] + position[n],  s[q, n] = <query[q], z[n]> / sqrt(C)
//   pooled[q] = sum over n of softmax_n(s[q, n]) z[n],  out = weight . flatten(pooled) + bias
//
// for each frame of each clip, with N places and C features. The difference lives in registers and
// in one row of scratch memory: nothing of size [B, T, N, C] is written.
#pragma once

#include <cstdint>

#include "../core/stream.h"
#include "../core/tensor_view.h"

namespace vtok {

// Queries whose sums a CUDA thread holds in registers.
constexpr int kResidualPoolMaxQueries = 16;
// pooled of one frame lies in shared memory: 64 KB of float32, within the 99 KB of every chip.
constexpr int64_t kResidualPoolMaxPooled = 16384;
// Places of a frame that one CUDA block scores; a frame is cut into as many pieces as it needs.
constexpr int kResidualPoolPlaces = 64;

// Sizes, and strides in elements.
struct ResidualPoolLayout {
  int64_t batch, frames, places, channels;  // B, T, N, C
  int64_t frame_strides[4];                 // of frames [B, T, N, C]
  int64_t key_strides[3];                   // of key [B, N, C]
  int num_queries;                          // Q
  int64_t outputs;                          // D

  int64_t num_frames() const { return batch * frames; }
  int64_t num_pieces() const { return (places + kResidualPoolPlaces - 1) / kResidualPoolPlaces; }
};

// "real" is float32, or float64 for float64 frames; all but frames and key are contiguous.
struct ResidualPoolForward {
  ResidualPoolLayout layout;
  TensorView frames;       // [B, T, N, C] floating
  TensorView key;          // [B, N, C] as frames
  TensorView position;     // [N, C] real
  TensorView query;        // [Q, C] real
  TensorView weight;       // [D, Q * C] real
  TensorView bias;         // [D] real
  OutputView out;          // [B, T, D] as frames
  OutputView pooled;       // [B, T, Q, C] real
  OutputView log_sum;      // [B, T, Q] real: log of the sum over n of e^s
  WorkspaceView partials;  // [B * T, pieces, Q, C + 2] real on CUDA, absent on the CPU
  int num_threads;
};

// Gradients of the pool alone: those of weight and bias, and grad_pooled itself, are three small
// matrix products that Python leaves to torch. An absent gradient has null data.
struct ResidualPoolBackward {
  ResidualPoolLayout layout;
  TensorView frames;         // [B, T, N, C] floating
  TensorView key;            // [B, N, C] as frames
  TensorView position;       // [N, C] real
  TensorView query;          // [Q, C] real
  TensorView log_sum;        // [B, T, Q] real
  TensorView grad_pooled;    // [B, T, Q, C] real
  TensorView mean_grad;      // [B, T, Q] real: <pooled, grad_pooled>
  OutputView grad_frames;    // [B, T, N, C] contiguous, as frames
  OutputView grad_key;       // [B, N, C] contiguous, as frames
  OutputView grad_position;  // [N, C] real
  OutputView grad_query;     // [Q, C] real
  WorkspaceView attention;   // [2, B, T, Q, N] real: softmax weights, and gradients of s
  WorkspaceView partials;    // [B * T, pieces, Q, C] real; the CPU uses one piece per frame
  int num_threads;
};

void residual_pool_forward_cpu(const ResidualPoolForward& params);
void residual_pool_backward_cpu(const ResidualPoolBackward& params);

void residual_pool_forward_cuda(const ResidualPoolForward& params, Stream stream);
void residual_pool_backward_cuda(const ResidualPoolBackward& params, Stream stream);

}  // namespace vtok
