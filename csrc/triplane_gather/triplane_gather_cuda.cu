// Triplane lookup on CUDA, forward.
//
// A block handles kPoints points: its threads first locate one point each, in shared memory, then
// run over the 16-byte words of the block's output, which is one contiguous piece of memory, so
// that every store is coalesced. A word takes four words of a plane, from the L1 or L2 cache:
// planes are small (41 KB per clip in CoordTok). Expected to be bound by writing the output where
// that is large, by the latency of the launch below about 10,000 points.
#include "triplane_gather_points.cuh"

namespace vtok {
namespace {

template <typename T, typename Coord, int kWidth>
__global__ void __launch_bounds__(kPoints)
    triplane_gather_forward_cat_kernel(const DevicePoints<Coord> points,
                                       const DevicePlanes<T> planes,
                                       T* __restrict__ out,  // [B, N, 3 * C]
                                       unsigned blocks_per_entry) {
  VTOK_SHARED(PointTile, tile, 1);
  const int64_t batch = blockIdx.x / blocks_per_entry;
  const unsigned first = (blockIdx.x - batch * blocks_per_entry) * kPoints;
  locate_tile(points, batch, first, tile[0]);
  __syncthreads();
  const unsigned remaining = points.num_points - first;
  const unsigned count = remaining < kPoints ? remaining : kPoints;
  const unsigned words_per_plane = planes.channels / kWidth;
  const unsigned words_per_point = kTriplanePlanes * words_per_plane;
  T* block_out = out + (batch * points.num_points + first) * kTriplanePlanes * planes.channels;
  for (unsigned word = threadIdx.x; word < count * words_per_point; word += kPoints) {
    const unsigned i = word / words_per_point;
    const unsigned word_of_point = word - i * words_per_point;
    const int plane = word_of_point / words_per_plane;
    const int channel = (word_of_point - plane * words_per_plane) * kWidth;
    const PlanePosition at =
        position_in_plane(tile[0], i, plane, points.resolution, planes.channels);
    float feature[kWidth];
    interpolate<kWidth>(pick(planes.data, plane) + batch * pick(planes.elements, plane), at,
                        channel, feature);
    Vector<T, kWidth> result;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) result.values[c] = from_float<T>(feature[c]);
    store_vector(block_out + word * kWidth, result);
  }
}

// Sum or product of the three features.
template <bool kIsProduct, typename T, typename Coord, int kWidth>
__global__ void __launch_bounds__(kPoints)
    triplane_gather_forward_reduced_kernel(const DevicePoints<Coord> points,
                                           const DevicePlanes<T> planes,
                                           T* __restrict__ out,  // [B, N, C]
                                           unsigned blocks_per_entry) {
  VTOK_SHARED(PointTile, tile, 1);
  const int64_t batch = blockIdx.x / blocks_per_entry;
  const unsigned first = (blockIdx.x - batch * blocks_per_entry) * kPoints;
  locate_tile(points, batch, first, tile[0]);
  __syncthreads();
  const unsigned remaining = points.num_points - first;
  const unsigned count = remaining < kPoints ? remaining : kPoints;
  const unsigned words_per_point = planes.channels / kWidth;
  T* block_out = out + (batch * points.num_points + first) * planes.channels;
  for (unsigned word = threadIdx.x; word < count * words_per_point; word += kPoints) {
    const unsigned i = word / words_per_point;
    const int channel = (word - i * words_per_point) * kWidth;
    float feature[kTriplanePlanes][kWidth];
#pragma unroll
    for (int p = 0; p < kTriplanePlanes; ++p) {
      interpolate<kWidth>(planes.data[p] + batch * planes.elements[p],
                          position_in_plane(tile[0], i, p, points.resolution, planes.channels),
                          channel, feature[p]);
    }
    Vector<T, kWidth> result;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float value = kIsProduct ? feature[0][c] * feature[1][c] * feature[2][c]
                                     : feature[0][c] + feature[1][c] + feature[2][c];
      result.values[c] = from_float<T>(value);
    }
    store_vector(block_out + word * kWidth, result);
  }
}

template <int kWidth, typename T, typename Coord>
void launch_forward(const TriplaneForward& params, const DevicePoints<Coord>& points,
                    const DevicePlanes<T>& planes, Stream stream) {
  const unsigned blocks = point_blocks(params.shape);
  const unsigned per_entry = blocks / static_cast<unsigned>(params.shape.batch);
  T* out = params.out.data_as<T>();
  switch (params.reduce) {
    case TriplaneReduce::kCat:
      VTOK_LAUNCH((triplane_gather_forward_cat_kernel<T, Coord, kWidth>), dim3(blocks),
                  dim3(kPoints), 0, stream, points, planes, out, per_entry);
      break;
    case TriplaneReduce::kSum:
      VTOK_LAUNCH((triplane_gather_forward_reduced_kernel<false, T, Coord, kWidth>), dim3(blocks),
                  dim3(kPoints), 0, stream, points, planes, out, per_entry);
      break;
    case TriplaneReduce::kProduct:
      VTOK_LAUNCH((triplane_gather_forward_reduced_kernel<true, T, Coord, kWidth>), dim3(blocks),
                  dim3(kPoints), 0, stream, points, planes, out, per_entry);
      break;
  }
}

}  // namespace

void triplane_gather_forward_cuda(const TriplaneForward& params, Stream stream) {
  const DeviceGuard device(params.out.device_index);
  dispatch_floating_cuda("triplane_gather", "plane_xy", params.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    const DevicePlanes<T> planes = device_planes<T>(params.shape, params.planes);
    const bool is_wide = params.shape.channels % kWidth == 0 && is_aligned(params.out.data) &&
                         is_aligned(planes.data[0]) && is_aligned(planes.data[1]) &&
                         is_aligned(planes.data[2]);
    dispatch_points(params.shape, params.points, [&](const auto& points) {
      if (is_wide) {
        launch_forward<kWidth>(params, points, planes, stream);
      } else {
        launch_forward<1>(params, points, planes, stream);
      }
    });
  });
}

}  // namespace vtok
