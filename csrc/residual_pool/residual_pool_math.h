// Arithmetic of residual_pool, shared by the CPU and the CUDA kernels.
//
//   z = frame - key + position
//   ds = p (<grad_pooled, z> - <grad_pooled, pooled>),  p = e^(s - log_sum)
//   grad_z = sum over q of p[q] grad_pooled[q] + ds[q] scale query[q]
//   grad_frame = grad_z,  grad_key = -sum over t,  grad_position = sum over b and t
//   grad_query[q] = scale * sum over b, t, n of ds[q] z
//
// Source: the residual of VTok (arXiv 2602.04202) with learned queries; softmax summed online as in
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).
#pragma once

#include "../core/host_device.h"
#include "../core/vectorized.h"
#include "residual_pool.h"

namespace vtok {

// Offset of frame `number` = b * T + t, and of the key of its clip.
VTOK_FUNCTION int64_t frame_offset(const ResidualPoolLayout& layout, int64_t number) {
  const int64_t clip = number / layout.frames;
  return clip * layout.frame_strides[0] + (number - clip * layout.frames) * layout.frame_strides[1];
}

VTOK_FUNCTION int64_t key_offset(const ResidualPoolLayout& layout, int64_t number) {
  return number / layout.frames * layout.key_strides[0];
}

template <typename Real>
VTOK_FUNCTION Real residual_value(Real frame, Real key, Real position) {
  return (frame - key) + position;
}

// What earlier sums are multiplied with when the largest score grows from `before` to `after`.
template <typename Real>
VTOK_FUNCTION Real softmax_rescale(Real before, Real after) {
  return before == after ? Real(1) : exp_accurate(before - after);
}

// Gradient of a score, given its softmax weight, <grad_pooled, z> and <grad_pooled, pooled>.
template <typename Real>
VTOK_FUNCTION Real score_gradient(Real probability, Real along_z, Real mean) {
  return probability * (along_z - mean);
}

}  // namespace vtok
