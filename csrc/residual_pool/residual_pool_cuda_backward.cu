// residual_pool on CUDA, backward: three kernels and no atomics, hence bitwise repeatable.
//
//   piece    block (frame, piece of places): softmax weights and score gradients by a warp per
//            place, then a thread per channel writes grad_frames and the piece's part of grad_query
//   place    thread (place, channel): sums over frames and clips in order, grad_key and
//            grad_position; reads the [Q, N] tables of the first kernel and no frame
//   query    thread (query, channel): adds the pieces' parts in order
#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "residual_pool.h"
#include "residual_pool_device.cuh"

namespace vtok {
namespace {

// Null where a gradient is not needed.
template <typename T>
struct BackwardPointers {
  const float* grad_pooled;  // [B, T, Q, C]
  const float* query;        // [Q, C]
  float* probability;        // [B, T, Q, N]
  float* grad_score;         // [B, T, Q, N]
  float* partials;           // [B * T, pieces, Q, C]
  T* grad_frames;            // [B, T, N, C]
  T* grad_key;               // [B, N, C]
  float* grad_position;      // [N, C]
};

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    residual_pool_piece_kernel(const ResidualPoolLayout layout, int64_t num_pieces,
                               const T* __restrict__ frames,         // [B, T, N, C]
                               const T* __restrict__ key,            // [B, N, C]
                               const float* __restrict__ position,   // [N, C]
                               const float* __restrict__ log_sum,    // [B, T, Q]
                               const float* __restrict__ mean_grad,  // [B, T, Q]
                               const BackwardPointers<T> p) {
  VTOK_SHARED(float, weights, kResidualPoolMaxQueries* kResidualPoolPlaces);  // [Q, places]
  VTOK_SHARED(float, slopes, kResidualPoolMaxQueries* kResidualPoolPlaces);   // [Q, places]
  const ResidualPiece<T> piece(layout, frames, key, position);
  const int64_t width = layout.num_queries * layout.channels;
  const float* grad_pooled = p.grad_pooled + piece.number * width;
  float scores[kResidualPoolMaxQueries];
  float along_z[kResidualPoolMaxQueries];
  for (int n = threadIdx.x / kPoolWarp; n < piece.count; n += kPoolWarps) {
    piece.products(layout, n, p.query, scores);
    piece.products(layout, n, grad_pooled, along_z);
    if (threadIdx.x % kPoolWarp != 0) continue;
    for (int q = 0; q < layout.num_queries; ++q) {
      const int64_t row = piece.number * layout.num_queries + q;
      const float weight = exp_accurate(piece.scale * scores[q] - log_sum[row]);
      const float slope = piece.scale * score_gradient(weight, along_z[q], mean_grad[row]);
      weights[q * kResidualPoolPlaces + n] = weight;
      slopes[q * kResidualPoolPlaces + n] = slope;
      p.probability[row * layout.places + piece.first + n] = weight;
      p.grad_score[row * layout.places + piece.first + n] = slope;
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < layout.channels; c += kPoolThreads) {
    float sums[kResidualPoolMaxQueries] = {};
    for (int n = 0; n < piece.count; ++n) {
      const float z = piece.value(layout, n, c);
      float grad_z = 0.0f;
#pragma unroll
      for (int q = 0; q < kResidualPoolMaxQueries; ++q) {
        if (q < layout.num_queries) {
          const float slope = slopes[q * kResidualPoolPlaces + n];
          sums[q] += slope * z;
          grad_z += weights[q * kResidualPoolPlaces + n] * grad_pooled[q * layout.channels + c];
          grad_z += slope * p.query[q * layout.channels + c];
        }
      }
      if (p.grad_frames != nullptr) {
        const int64_t row = piece.number * layout.places + piece.first + n;
        p.grad_frames[row * layout.channels + c] = from_float<T>(grad_z);
      }
    }
    if (p.partials == nullptr) continue;
    float* target = p.partials + (piece.number * num_pieces + piece.index) * width;
#pragma unroll
    for (int q = 0; q < kResidualPoolMaxQueries; ++q) {
      if (q < layout.num_queries) target[q * layout.channels + c] = sums[q];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    residual_pool_place_kernel(const ResidualPoolLayout layout, const BackwardPointers<T> p) {
  const int64_t at = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  if (at >= layout.places * layout.channels) return;
  const int64_t place = at / layout.channels;
  const int64_t c = at - place * layout.channels;
  float of_all = 0.0f;
  for (int64_t clip = 0; clip < layout.batch; ++clip) {
    float of_clip = 0.0f;
    for (int64_t t = 0; t < layout.frames; ++t) {
      const int64_t first = (clip * layout.frames + t) * layout.num_queries;
      for (int q = 0; q < layout.num_queries; ++q) {
        const int64_t entry = (first + q) * layout.places + place;
        of_clip += p.probability[entry] * p.grad_pooled[(first + q) * layout.channels + c];
        of_clip += p.grad_score[entry] * p.query[q * layout.channels + c];
      }
    }
    if (p.grad_key != nullptr) {
      p.grad_key[(clip * layout.places + place) * layout.channels + c] = from_float<T>(-of_clip);
    }
    of_all += of_clip;
  }
  if (p.grad_position != nullptr) p.grad_position[at] = of_all;
}

__global__ void __launch_bounds__(kPoolThreads)
    residual_pool_query_kernel(int64_t width, int64_t num_parts,
                               const float* __restrict__ partials,  // [parts, Q * C]
                               float* __restrict__ grad_query) {    // [Q * C]
  const int64_t i = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  if (i >= width) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < num_parts; ++part) sum += partials[part * width + i];
  grad_query[i] = sum;
}

template <typename T>
T* pointer_or_null(const OutputView& view) {
  return view.data == nullptr ? nullptr : view.data_as<T>();
}

dim3 blocks_for(int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kPoolThreads - 1) / kPoolThreads));
}

template <typename T>
void launch_backward(const ResidualPoolBackward& params, Stream stream) {
  const ResidualPoolLayout& layout = params.layout;
  const int64_t pieces = layout.num_pieces();
  const int64_t width = layout.num_queries * layout.channels;
  float* attention = params.attention.data_as<float>();
  const BackwardPointers<T> p{
      params.grad_pooled.data_as<float>(),
      params.query.data_as<float>(),
      attention,
      attention + layout.num_frames() * layout.num_queries * layout.places,
      params.grad_query.data == nullptr ? nullptr : params.partials.data_as<float>(),
      pointer_or_null<T>(params.grad_frames),
      pointer_or_null<T>(params.grad_key),
      pointer_or_null<float>(params.grad_position)};
  VTOK_LAUNCH((residual_pool_piece_kernel<T>),
              dim3(static_cast<unsigned>(layout.num_frames()), static_cast<unsigned>(pieces)),
              dim3(kPoolThreads), 0, stream, layout, pieces, params.frames.data_as<T>(),
              params.key.data_as<T>(), params.position.data_as<float>(),
              params.log_sum.data_as<float>(), params.mean_grad.data_as<float>(), p);
  if (p.grad_key != nullptr || p.grad_position != nullptr) {
    VTOK_LAUNCH((residual_pool_place_kernel<T>), blocks_for(layout.places * layout.channels),
                dim3(kPoolThreads), 0, stream, layout, p);
  }
  if (params.grad_query.data == nullptr) return;
  VTOK_LAUNCH(residual_pool_query_kernel, blocks_for(width), dim3(kPoolThreads), 0, stream, width,
              layout.num_frames() * pieces, static_cast<const float*>(p.partials),
              params.grad_query.data_as<float>());
}

}  // namespace

void residual_pool_backward_cuda(const ResidualPoolBackward& params, Stream stream) {
  const DeviceGuard guard(params.frames.device_index);
  dispatch_floating_cuda("residual_pool backward", "frames", params.frames.dtype, [&](auto tag) {
    launch_backward<typename decltype(tag)::type>(params, stream);
  });
}

}  // namespace vtok
