// residual_pool on CUDA, forward: two kernels, so that few frames still fill the chip.
//
//   score    block (frame, piece of kResidualPoolPlaces places): a warp per place forms z and its
//            scalar products with all queries; then a thread per channel adds e^(s - largest) z,
//            reading the piece a second time, out of L2. Writes sums, largest score and total.
//   project  block (frame, slice of outputs): joins the pieces into `pooled` in shared memory, then
//            a warp per output forms its scalar product.
//
// Frames and keys are read once from memory; the pieces' sums are C / (64 C) of that per query.
#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "residual_pool.h"
#include "residual_pool_device.cuh"

namespace vtok {
namespace {

constexpr int kOutputsPerBlock = 64;

// Sums of one piece: C values, then the largest score and the total of e^(s - largest).
VTOK_FUNCTION int64_t partial_offset(const ResidualPoolLayout& layout, int64_t number,
                                     int64_t piece, int q) {
  const int64_t pieces = (layout.places + kResidualPoolPlaces - 1) / kResidualPoolPlaces;
  return ((number * pieces + piece) * layout.num_queries + q) * (layout.channels + 2);
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    residual_pool_score_kernel(const ResidualPoolLayout layout,
                               const T* __restrict__ frames,        // [B, T, N, C]
                               const T* __restrict__ key,           // [B, N, C]
                               const float* __restrict__ position,  // [N, C]
                               const float* __restrict__ query,     // [Q, C]
                               float* __restrict__ partials) {      // [B * T, pieces, Q, C + 2]
  VTOK_SHARED(float, scores, kResidualPoolMaxQueries* kResidualPoolPlaces);  // [Q, places]
  const ResidualPiece<T> piece(layout, frames, key, position);
  float products[kResidualPoolMaxQueries];
  for (int n = threadIdx.x / kPoolWarp; n < piece.count; n += kPoolWarps) {
    piece.products(layout, n, query, products);
    if (threadIdx.x % kPoolWarp == 0) {
      for (int q = 0; q < layout.num_queries; ++q) {
        scores[q * kResidualPoolPlaces + n] = piece.scale * products[q];
      }
    }
  }
  __syncthreads();
  // A thread per query turns its scores into shares; the others wait at the barrier below.
  const int q_own = threadIdx.x;
  if (q_own < layout.num_queries) {
    float* row = scores + q_own * kResidualPoolPlaces;
    float largest = row[0];
    for (int n = 1; n < piece.count; ++n) largest = row[n] > largest ? row[n] : largest;
    float total = 0.0f;
    for (int n = 0; n < piece.count; ++n) {
      row[n] = exp_accurate(row[n] - largest);
      total += row[n];
    }
    float* target = partials + partial_offset(layout, piece.number, piece.index, q_own);
    target[layout.channels] = largest;
    target[layout.channels + 1] = total;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < layout.channels; c += kPoolThreads) {
    float sums[kResidualPoolMaxQueries] = {};
    for (int n = 0; n < piece.count; ++n) {
      const float z = piece.value(layout, n, c);
#pragma unroll
      for (int q = 0; q < kResidualPoolMaxQueries; ++q) {
        if (q < layout.num_queries) sums[q] += scores[q * kResidualPoolPlaces + n] * z;
      }
    }
#pragma unroll
    for (int q = 0; q < kResidualPoolMaxQueries; ++q) {
      if (q < layout.num_queries) {
        partials[partial_offset(layout, piece.number, piece.index, q) + c] = sums[q];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    residual_pool_project_kernel(const ResidualPoolLayout layout, int64_t num_pieces,
                                 const float* __restrict__ partials,  // [B * T, pieces, Q, C + 2]
                                 const float* __restrict__ weight,    // [D, Q * C]
                                 const float* __restrict__ bias,      // [D]
                                 T* __restrict__ out,                 // [B, T, D]
                                 float* __restrict__ pooled,          // [B, T, Q, C]
                                 float* __restrict__ log_sum) {       // [B, T, Q]
  VTOK_DYNAMIC_SHARED(float, row);                                    // [Q, C]
  const int64_t number = blockIdx.x;
  const int64_t width = layout.num_queries * layout.channels;
  for (int q = 0; q < layout.num_queries; ++q) {
    // Every thread joins the few pieces by itself: no barrier, and equal bits in all of them.
    const int64_t last = layout.channels;
    float largest = partials[partial_offset(layout, number, 0, q) + last];
    for (int64_t piece = 1; piece < num_pieces; ++piece) {
      const float other = partials[partial_offset(layout, number, piece, q) + last];
      largest = other > largest ? other : largest;
    }
    float total = 0.0f;
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      const float* from = partials + partial_offset(layout, number, piece, q) + last;
      total += softmax_rescale(from[0], largest) * from[1];
    }
    const float inverse = 1.0f / total;
    for (int64_t c = threadIdx.x; c < layout.channels; c += kPoolThreads) {
      float sum = 0.0f;
      for (int64_t piece = 0; piece < num_pieces; ++piece) {
        const float* from = partials + partial_offset(layout, number, piece, q);
        sum += softmax_rescale(from[last], largest) * from[c];
      }
      row[q * layout.channels + c] = sum * inverse;
      if (blockIdx.y == 0) pooled[number * width + q * layout.channels + c] = sum * inverse;
    }
    if (blockIdx.y == 0 && threadIdx.x == 0) {
      log_sum[number * layout.num_queries + q] = largest + log_accurate(total);
    }
  }
  __syncthreads();
  const int64_t first = int64_t{blockIdx.y} * kOutputsPerBlock + threadIdx.x / kPoolWarp;
  int64_t end = int64_t{blockIdx.y} * kOutputsPerBlock + kOutputsPerBlock;
  end = end < layout.outputs ? end : layout.outputs;
  const int lane = threadIdx.x % kPoolWarp;
  for (int64_t d = first; d < end; d += kPoolWarps) {
    float sum = 0.0f;
    for (int64_t i = lane; i < width; i += kPoolWarp) sum += weight[d * width + i] * row[i];
    sum = sum_of_warp(sum);
    if (lane == 0) out[number * layout.outputs + d] = from_float<T>(sum + bias[d]);
  }
}

template <typename T>
void launch_forward(const ResidualPoolForward& params, Stream stream) {
  const ResidualPoolLayout& layout = params.layout;
  const int64_t pieces = layout.num_pieces();
  const auto grid_x = static_cast<unsigned>(layout.num_frames());
  float* partials = params.partials.data_as<float>();
  VTOK_LAUNCH((residual_pool_score_kernel<T>), dim3(grid_x, static_cast<unsigned>(pieces)),
              dim3(kPoolThreads), 0, stream, layout, params.frames.data_as<T>(),
              params.key.data_as<T>(), params.position.data_as<float>(),
              params.query.data_as<float>(), partials);
  const auto slices = (layout.outputs + kOutputsPerBlock - 1) / kOutputsPerBlock;
  const size_t shared = layout.num_queries * layout.channels * sizeof(float);
  VTOK_LAUNCH((residual_pool_project_kernel<T>), dim3(grid_x, static_cast<unsigned>(slices)),
              dim3(kPoolThreads), shared, stream, layout, pieces, partials,
              params.weight.data_as<float>(), params.bias.data_as<float>(), params.out.data_as<T>(),
              params.pooled.data_as<float>(), params.log_sum.data_as<float>());
}

}  // namespace

void residual_pool_forward_cuda(const ResidualPoolForward& params, Stream stream) {
  const DeviceGuard guard(params.frames.device_index);
  dispatch_floating_cuda("residual_pool", "frames", params.frames.dtype, [&](auto tag) {
    launch_forward<typename decltype(tag)::type>(params, stream);
  });
}

}  // namespace vtok
