// Gradients of the triplane lookup on CUDA: what goes to the features, and to the coordinates. The
// gradients of the planes are in triplane_gather_cuda_planes.cu.
//
// Concatenated and added features get the gradient of the output as it is. For products, a launch
// before the others writes the gradient of every feature as [B, N, 3 * C] float32, so that the
// others need not know. A coordinate gradient takes 8 lanes per point, which read 32 contiguous
// bytes of each of its 12 cells.
#include "triplane_gather_points.cuh"

namespace vtok {
namespace {

// For products: the gradient of every feature, grad_out times the other two features.
template <typename T, typename Coord, int kWidth>
__global__ void __launch_bounds__(kPoints)
    triplane_gather_product_kernel(const DevicePoints<Coord> points, const DevicePlanes<T> planes,
                                   const T* __restrict__ grad_out,     // [B, N, C]
                                   float* __restrict__ grad_features,  // [B, N, 3 * C]
                                   unsigned blocks_per_entry) {
  VTOK_SHARED(PointTile, tile, 1);
  const int64_t batch = blockIdx.x / blocks_per_entry;
  const unsigned first = (blockIdx.x - batch * blocks_per_entry) * kPoints;
  locate_tile(points, batch, first, tile[0]);
  __syncthreads();
  const unsigned remaining = points.num_points - first;
  const unsigned count = remaining < kPoints ? remaining : kPoints;
  const unsigned words_per_point = planes.channels / kWidth;
  const int64_t first_point = batch * points.num_points + first;
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
    const int64_t point = (first_point + i) * planes.channels;
    const auto grad = load_vector<Vector<T, kWidth>>(grad_out + point + channel);
#pragma unroll
    for (int p = 0; p < kTriplanePlanes; ++p) {
      const int a = (p + 1) % kTriplanePlanes, b = (p + 2) % kTriplanePlanes;
      Vector<float, kWidth> result;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        result.values[c] = to_float(grad.values[c]) * (feature[a][c] * feature[b][c]);
      }
      store_vector(grad_features + kTriplanePlanes * point + p * planes.channels + channel, result);
    }
  }
}

constexpr int kCoordThreads = 128;
constexpr int kCoordPoints = kCoordThreads / kSlab;  // kSlab lanes share a point

template <typename T, typename Grad>
__global__ void __launch_bounds__(kCoordThreads)
    triplane_gather_coords_kernel(const DevicePoints<float> points, const DevicePlanes<T> planes,
                                  const FeatureGradients<Grad> gradients,
                                  float* __restrict__ grad_coords,  // [B, N, 3]
                                  unsigned blocks_per_entry) {
  const int64_t batch = blockIdx.x / blocks_per_entry;
  const unsigned first = (blockIdx.x - batch * blocks_per_entry) * kCoordPoints;
  const unsigned wanted = first + threadIdx.x / kSlab;
  // Lanes without a point repeat the last one: all take part in the shuffles.
  const unsigned n = wanted < points.num_points ? wanted : points.num_points - 1;
  const int lane = threadIdx.x % kSlab;
  float coordinate[kTriplaneAxes], sum[kTriplaneAxes];
  AxisPosition<float> at[kTriplaneAxes];
#pragma unroll
  for (int axis = 0; axis < kTriplaneAxes; ++axis) {
    coordinate[axis] = coordinate_of(points, batch, n, axis);
    at[axis] = triplane_locate(coordinate[axis], points.resolution[axis]);
    sum[axis] = 0;
  }
  const Grad* gradient = gradients.data + (batch * points.num_points + n) * gradients.point_stride;
#pragma unroll
  for (int p = 0; p < kTriplanePlanes; ++p) {
    const int row_axis = triplane_row_axis(p), column_axis = triplane_column_axis(p);
    const AxisPosition<float>&row = at[row_axis], &column = at[column_axis];
    const int row_elements = points.resolution[column_axis] * planes.channels;
    const T* lower = planes.data[p] + batch * planes.elements[p] + row.lower * row_elements +
                     column.lower * planes.channels;
    const T* upper = lower + row.step * row_elements;
    const int step = column.step * planes.channels;
    for (int c = lane; c < planes.channels; c += kSlab) {
      const float g = to_float(gradient[p * gradients.plane_stride + c]);
      const float ll = to_float(lower[c]), lu = to_float(lower[step + c]);
      const float ul = to_float(upper[c]), uu = to_float(upper[step + c]);
      sum[row_axis] += g * triplane_row_slope(ll, lu, ul, uu, column.fraction);
      sum[column_axis] += g * triplane_column_slope(ll, lu, ul, uu, row.fraction);
    }
  }
#pragma unroll
  for (int axis = 0; axis < kTriplaneAxes; ++axis) {
#pragma unroll
    for (int other = kSlab / 2; other > 0; other /= 2) {
      sum[axis] += __shfl_xor_sync(0xffffffffu, sum[axis], other);
    }
    if (lane == axis && wanted < points.num_points) {
      grad_coords[(batch * points.num_points + n) * kTriplaneAxes + axis] =
          sum[axis] * triplane_position_slope(coordinate[axis], points.resolution[axis]);
    }
  }
}

template <typename T>
FeatureGradientView product_gradients(const TriplaneBackward& params, Stream stream) {
  const TriplaneShape& shape = params.shape;
  const int64_t chunks = shape.batch * triplane_gather_chunks_cuda(shape);
  float* features =
      params.workspace.data_as<float>() + chunks * triplane_offset(shape, kTriplanePlanes);
  const DevicePlanes<T> planes = device_planes<T>(shape, params.planes);
  const T* grad_out = params.grad_out.data_as<T>();
  const bool is_wide = shape.channels % 4 == 0 && is_aligned(grad_out) && is_aligned(features) &&
                       is_aligned(planes.data[0]) && is_aligned(planes.data[1]) &&
                       is_aligned(planes.data[2]);
  const unsigned blocks = point_blocks(shape);
  const unsigned per_entry = blocks / static_cast<unsigned>(shape.batch);
  dispatch_points(shape, params.points, [&](const auto& points) {
    using Coord = typename std::decay_t<decltype(points)>::Value;
    if (is_wide) {
      VTOK_LAUNCH((triplane_gather_product_kernel<T, Coord, 4>), dim3(blocks), dim3(kPoints), 0,
                  stream, points, planes, grad_out, features, per_entry);
    } else {
      VTOK_LAUNCH((triplane_gather_product_kernel<T, Coord, 1>), dim3(blocks), dim3(kPoints), 0,
                  stream, points, planes, grad_out, features, per_entry);
    }
  });
  const int channels = static_cast<int>(shape.channels);
  return {features, DType::kFloat32, kTriplanePlanes * channels, channels};
}

template <typename T, typename Grad>
void launch_coords(const TriplaneBackward& params, const FeatureGradientView& gradients,
                   Stream stream) {
  const TriplaneShape& shape = params.shape;
  const int64_t per_entry = (shape.num_points + kCoordPoints - 1) / kCoordPoints;
  VTOK_CHECK_VALUE(shape.batch * per_entry <= 0x7fffffff,
                   "triplane_gather: coords have too many points for one launch, got ",
                   shape.batch * shape.num_points);
  VTOK_LAUNCH((triplane_gather_coords_kernel<T, Grad>),
              dim3(static_cast<unsigned>(shape.batch * per_entry)), dim3(kCoordThreads), 0, stream,
              device_points<float>(shape, params.points), device_planes<T>(shape, params.planes),
              gradients.as<Grad>(), params.grad_coords.data_as<float>(),
              static_cast<unsigned>(per_entry));
}

}  // namespace

void triplane_gather_backward_cuda(const TriplaneBackward& params, Stream stream) {
  const DeviceGuard device(params.grad_out.device_index);
  const int channels = static_cast<int>(params.shape.channels);
  const bool has_points = params.shape.num_points > 0;
  dispatch_floating_cuda(
      "triplane_gather backward", "plane_xy", params.grad_out.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const bool is_cat = params.reduce == TriplaneReduce::kCat;
        FeatureGradientView gradients{params.grad_out.data, params.grad_out.dtype,
                                      is_cat ? kTriplanePlanes * channels : channels,
                                      is_cat ? channels : 0};
        const bool is_product = params.reduce == TriplaneReduce::kProduct;
        if (is_product && has_points) gradients = product_gradients<T>(params, stream);
        bool any_plane = false;
        for (const OutputView& view : params.grad_planes)
          any_plane = any_plane || view.data != nullptr;
        if (any_plane) triplane_gather_planes_cuda(params, gradients, stream);
        if (params.grad_coords.data == nullptr || !has_points) return;
        if (is_product) {
          launch_coords<T, float>(params, gradients, stream);
        } else {
          launch_coords<T, T>(params, gradients, stream);
        }
      });
}

}  // namespace vtok
