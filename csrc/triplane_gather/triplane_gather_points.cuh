// What the CUDA kernels of the triplane lookup share: where a point lies, and the four cells around
// it.
#pragma once

#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "triplane_gather_math.h"

namespace vtok {
namespace {

// Points whose positions a block keeps in shared memory, and its threads.
constexpr int kPoints = 128;
// Lanes that share a point in kernels over channels, and channels of a tile of sums: 32 bytes.
constexpr int kSlab = 8;

// One of the three values of a kernel parameter. An index known only at run time would make the
// compiler copy the array to local memory.
template <typename Value>
__device__ __forceinline__ Value pick(const Value (&values)[3], int index) {
  return index == 0 ? values[0] : (index == 1 ? values[1] : values[2]);
}

template <typename Coord>
struct DevicePoints {
  using Value = Coord;
  const Coord* axis[kTriplaneAxes];
  int64_t batch_stride;
  int64_t stride[kTriplaneAxes];
  float divisor[kTriplaneAxes];
  int resolution[kTriplaneAxes];
  unsigned num_points;
  unsigned size_x, size_y;  // of a lattice; size_y is 0 without one
};

template <typename T>
struct DevicePlanes {
  const T* data[kTriplanePlanes];     // [B, R0, R1, C], [B, Rt, R1, C], [B, Rt, R0, C]
  int64_t elements[kTriplanePlanes];  // of one batch entry
  int channels;
};

template <typename Coord>
DevicePoints<Coord> device_points(const TriplaneShape& shape, const TriplanePoints& points) {
  DevicePoints<Coord> found{};
  for (int a = 0; a < kTriplaneAxes; ++a) {
    found.axis[a] = static_cast<const Coord*>(points.axis[a]);
    found.stride[a] = points.stride[a];
    found.divisor[a] = static_cast<float>(points.divisor[a]);
    found.resolution[a] = static_cast<int>(shape.resolution[a]);
  }
  found.batch_stride = points.batch_stride;
  found.num_points = static_cast<unsigned>(shape.num_points);
  found.size_x = points.is_lattice ? static_cast<unsigned>(points.lattice_size[1]) : 0;
  found.size_y = points.is_lattice ? static_cast<unsigned>(points.lattice_size[2]) : 0;
  return found;
}

template <typename T>
DevicePlanes<T> device_planes(const TriplaneShape& shape,
                              const TensorView (&planes)[kTriplanePlanes]) {
  DevicePlanes<T> found{};
  for (int p = 0; p < kTriplanePlanes; ++p) {
    found.data[p] = planes[p].data_as<T>();
    found.elements[p] = triplane_elements(shape, p);
  }
  found.channels = static_cast<int>(shape.channels);
  return found;
}

// Calls function(DevicePoints<Coord>) for the dtype of the coordinates.
template <typename Function>
void dispatch_points(const TriplaneShape& shape, const TriplanePoints& points,
                     Function&& function) {
  switch (points.dtype) {
    case DType::kFloat32: return function(device_points<float>(shape, points));
    case DType::kInt32: return function(device_points<int32_t>(shape, points));
    case DType::kInt64: return function(device_points<int64_t>(shape, points));
    default:
      VTOK_CHECK_TYPE(false,
                      "triplane_gather: coords must be float32, int32 or int64 on CUDA, got ",
                      name_of(points.dtype));
  }
}

// Coordinate of point `n` of a batch entry on `axis`.
template <typename Coord>
__device__ __forceinline__ float coordinate_of(const DevicePoints<Coord>& points, int64_t batch,
                                               unsigned n, int axis) {
  unsigned position = n;
  if (points.size_y != 0) {
    const unsigned row = n / points.size_y;
    const unsigned frame = row / points.size_x;
    position =
        axis == 0 ? frame : (axis == 1 ? row - frame * points.size_x : n - row * points.size_y);
  }
  const int64_t offset = batch * points.batch_stride + position * pick(points.stride, axis);
  return triplane_coordinate(pick(points.axis, axis)[offset], pick(points.divisor, axis));
}

// Positions of a block's points on the three axes; an array of structures would conflict in banks.
struct PointTile {
  float fraction[kTriplaneAxes][kPoints];
  int lower[kTriplaneAxes][kPoints];
};

// Thread i locates point first + i. The caller synchronises.
template <typename Coord>
__device__ __forceinline__ void locate_tile(const DevicePoints<Coord>& points, int64_t batch,
                                            unsigned first, PointTile& tile) {
  const unsigned n = first + threadIdx.x;
  if (n >= points.num_points) return;
#pragma unroll
  for (int axis = 0; axis < kTriplaneAxes; ++axis) {
    const AxisPosition<float> at =
        triplane_locate(coordinate_of(points, batch, n, axis), points.resolution[axis]);
    tile.fraction[axis][threadIdx.x] = at.fraction;
    tile.lower[axis][threadIdx.x] = at.lower;
  }
}

// Offsets in a plane of the cells around a point, and its fractions.
struct PlanePosition {
  int corner, row_step, column_step;  // in elements
  float row_fraction, column_fraction;
};

__device__ __forceinline__ PlanePosition position_in_plane(const PointTile& tile, int i, int plane,
                                                           const int (&resolution)[kTriplaneAxes],
                                                           int channels) {
  const int row_axis = triplane_row_axis(plane), column_axis = triplane_column_axis(plane);
  const int row = tile.lower[row_axis][i], column = tile.lower[column_axis][i];
  const int num_columns = pick(resolution, column_axis);
  return {(row * num_columns + column) * channels,
          row + 1 < pick(resolution, row_axis) ? num_columns * channels : 0,
          column + 1 < num_columns ? channels : 0, tile.fraction[row_axis][i],
          tile.fraction[column_axis][i]};
}

template <typename T, int kWidth>
struct DeviceCorners {
  Vector<T, kWidth> ll, lu, ul, uu;
};

template <int kWidth, typename T>
__device__ __forceinline__ DeviceCorners<T, kWidth> load_corners(const T* plane,  // one entry
                                                                 const PlanePosition& at,
                                                                 int channel) {
  using Word = Vector<T, kWidth>;
  const T* lower = plane + at.corner + channel;
  const T* upper = lower + at.row_step;
  return {load_vector<Word>(lower), load_vector<Word>(lower + at.column_step),
          load_vector<Word>(upper), load_vector<Word>(upper + at.column_step)};
}

template <int kWidth, typename T>
__device__ __forceinline__ void interpolate(const T* plane, const PlanePosition& at, int channel,
                                            float (&feature)[kWidth]) {
  const DeviceCorners<T, kWidth> cells = load_corners<kWidth>(plane, at, channel);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    feature[i] = triplane_interpolate(to_float(cells.ll.values[i]), to_float(cells.lu.values[i]),
                                      to_float(cells.ul.values[i]), to_float(cells.uu.values[i]),
                                      at.row_fraction, at.column_fraction);
  }
}

// Blocks of kPoints points over all batch entries, one after the other in x.
inline unsigned point_blocks(const TriplaneShape& shape) {
  const int64_t blocks = shape.batch * ((shape.num_points + kPoints - 1) / kPoints);
  VTOK_CHECK_VALUE(blocks <= 0x7fffffff,
                   "triplane_gather: coords have too many points for one launch, got ",
                   shape.batch * shape.num_points);
  return static_cast<unsigned>(blocks);
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Gradients of the features as kernels read them: that of channel c in plane p is
// data[(b * N + n) * point_stride + p * plane_stride + c].
template <typename Grad>
struct FeatureGradients {
  const Grad* data;
  int point_stride, plane_stride;
};

}  // namespace

struct FeatureGradientView {
  const void* data;
  DType dtype;
  int point_stride, plane_stride;

  template <typename Grad>
  FeatureGradients<Grad> as() const {
    return {static_cast<const Grad*>(data), point_stride, plane_stride};
  }
};

// Writes the gradients of the planes that need one.
void triplane_gather_planes_cuda(const TriplaneBackward& params,
                                 const FeatureGradientView& gradients, Stream stream);

}  // namespace vtok
