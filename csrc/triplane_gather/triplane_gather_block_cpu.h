// A block of points on the CPU: where each one lies in the three planes, and the loops over the
// channels of one point. Included by triplane_gather_cpu.cpp, once per instruction set.
#pragma once

#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "triplane_gather_math.h"

namespace vtok::VTOK_ISA {

// Points per block: their positions (84 B per point) and float32 features of 8 channels (96 B per
// point) leave most of a 32 KB L1 cache to the planes.
constexpr int kBlock = 64;
// Channels that one pass of the inner loops handles: a vector of 8 floats. CoordTok has 8 in all.
constexpr int kRow = 8;

VTOK_FUNCTION int64_t smaller(int64_t a, int64_t b) {
  return b < a ? b : a;
}

VTOK_FUNCTION int64_t larger(int64_t a, int64_t b) {
  return a < b ? b : a;
}

template <typename Real>
struct PointBlock {
  alignas(64) Real coordinate[kTriplaneAxes][kBlock];
  alignas(64) Real fraction[kTriplaneAxes][kBlock];
  alignas(64) int32_t lower[kTriplaneAxes][kBlock];
  alignas(64) int32_t step[kTriplaneAxes][kBlock];
  // Element offsets in a plane: of the lower corner, and from it to the upper row and column.
  alignas(64) int32_t corner[kTriplanePlanes][kBlock];
  alignas(64) int32_t row_step[kTriplanePlanes][kBlock];
  alignas(64) int32_t column_step[kTriplanePlanes][kBlock];
};

// Index along `axis` of `count` lattice points from point `first` on.
static inline void lattice_indices(const TriplanePoints& points, int axis, int64_t first, int count,
                                   int64_t* index) {
  int64_t inner = 1;  // points between neighbours along this axis
  for (int a = axis + 1; a < kTriplaneAxes; ++a) inner *= points.lattice_size[a];
  int64_t position = first / inner % points.lattice_size[axis];
  int64_t until_next = inner - first % inner;
  for (int i = 0; i < count; ++i) {
    index[i] = position;
    if (--until_next == 0) {
      until_next = inner;
      position = position + 1 == points.lattice_size[axis] ? 0 : position + 1;
    }
  }
}

// One axis: values[offset(i)] for `count` points.
template <typename Real, typename Coord, typename Offset>
VTOK_FUNCTION void load_axis(const Coord* values, int64_t divisor, int count, const Offset& offset,
                             Real* coordinate) {
  const Real real_divisor = static_cast<Real>(divisor);
  for (int i = 0; i < count; ++i) {
    coordinate[i] = triplane_coordinate(values[offset(i)], real_divisor);
  }
}

template <typename Real, typename Coord>
static void load_coordinates(const TriplanePoints& points, int64_t batch, int64_t first, int count,
                             PointBlock<Real>& block) {
  for (int axis = 0; axis < kTriplaneAxes; ++axis) {
    const int64_t stride = points.stride[axis];
    const Coord* values = static_cast<const Coord*>(points.axis[axis]);
    const int64_t divisor = points.divisor[axis];
    Real* coordinate = block.coordinate[axis];
    if (points.is_lattice) {
      int64_t index[kBlock];
      lattice_indices(points, axis, first, count, index);
      load_axis(values, divisor, count, [&](int i) { return index[i] * stride; }, coordinate);
      continue;
    }
    values += batch * points.batch_stride + first * stride;
    if (stride == kTriplaneAxes) {  // contiguous [B, N, 3]: a constant stride spares the gathers
      load_axis(values, divisor, count, [](int i) { return i * kTriplaneAxes; }, coordinate);
    } else {
      load_axis(values, divisor, count, [&](int i) { return i * stride; }, coordinate);
    }
  }
}

// Throws for the first NaN among the coordinates of the block.
template <typename Real>
static void refuse_nan(const PointBlock<Real>& block, bool is_lattice, int64_t batch, int64_t first,
                       int count) {
  int is_nan = 0;
  for (int axis = 0; axis < kTriplaneAxes; ++axis) {
    for (int i = 0; i < count; ++i) {
      is_nan |= block.coordinate[axis][i] != block.coordinate[axis][i];
    }
  }
  if (is_nan == 0) return;
  for (int i = 0; i < count; ++i) {
    for (int axis = 0; axis < kTriplaneAxes; ++axis) {
      if (block.coordinate[axis][i] != block.coordinate[axis][i]) {
        throw_triplane_nan(is_lattice, batch, first + i, axis);
      }
    }
  }
}

// From coordinates to positions in the planes.
template <typename Real>
static void locate_block(const TriplaneShape& shape, int count, PointBlock<Real>& block) {
  for (int axis = 0; axis < kTriplaneAxes; ++axis) {
    const int32_t resolution = static_cast<int32_t>(shape.resolution[axis]);
    for (int i = 0; i < count; ++i) {
      const AxisPosition<Real> at = triplane_locate(block.coordinate[axis][i], resolution);
      block.lower[axis][i] = at.lower;
      block.step[axis][i] = at.step;
      block.fraction[axis][i] = at.fraction;
    }
  }
  for (int plane = 0; plane < kTriplanePlanes; ++plane) {
    const int row_axis = triplane_row_axis(plane), column_axis = triplane_column_axis(plane);
    const int32_t column = static_cast<int32_t>(shape.channels);
    const int32_t row = static_cast<int32_t>(shape.resolution[column_axis]) * column;
    for (int i = 0; i < count; ++i) {
      block.corner[plane][i] =
          block.lower[row_axis][i] * row + block.lower[column_axis][i] * column;
      block.row_step[plane][i] = block.step[row_axis][i] * row;
      block.column_step[plane][i] = block.step[column_axis][i] * column;
    }
  }
}

// Fills the block with points [first, first + count) of a batch entry.
template <typename Real>
static void fill_block(const TriplaneShape& shape, const TriplanePoints& points, int64_t batch,
                       int64_t first, int count, PointBlock<Real>& block) {
  switch (points.dtype) {
    case DType::kInt32: load_coordinates<Real, int32_t>(points, batch, first, count, block); break;
    case DType::kInt64: load_coordinates<Real, int64_t>(points, batch, first, count, block); break;
    default: load_coordinates<Real, Real>(points, batch, first, count, block);
  }
  refuse_nan(block, points.is_lattice, batch, first, count);
  locate_block(shape, count, block);
}

// `kWidth` neighbouring channels of one point. A vector type and not a loop over an array: GCC
// unrolls loops of this length before it vectorises (measured: 422 instead of 164 us for 32,768
// points of 8 channels).
template <typename Real, int kWidth>
struct RowOf {
  typedef Real type __attribute__((vector_size(kWidth * sizeof(Real))));
};
template <typename Real, int kWidth>
using Row = typename RowOf<Real, kWidth>::type;

template <int kWidth, typename T>
VTOK_FUNCTION Row<real<T>, kWidth> load_row(const T* address) {
  Row<real<T>, kWidth> row;
  if constexpr (std::is_same_v<T, real<T>>) {
    memcpy(&row, address, sizeof row);
  } else {
    real<T> values[kWidth];
    for (int c = 0; c < kWidth; ++c) values[c] = load(address + c);
    memcpy(&row, values, sizeof row);
  }
  return row;
}

template <int kWidth, typename T>
VTOK_FUNCTION void store_row(T* address, Row<real<T>, kWidth> row) {
  if constexpr (std::is_same_v<T, real<T>>) {
    memcpy(address, &row, sizeof row);
  } else {
    real<T> values[kWidth];
    memcpy(values, &row, sizeof row);
    for (int c = 0; c < kWidth; ++c) store(address + c, values[c]);
  }
}

// The four cells around point i of the block: channels [0, kWidth) of `plane_data` on.
template <typename Row>
struct Corners {
  Row ll, lu, ul, uu;
};

template <int kWidth, typename T>
VTOK_FUNCTION Corners<Row<real<T>, kWidth>> load_corners(const T* plane_data, int plane,
                                                         const PointBlock<real<T>>& block, int i) {
  const T* lower = plane_data + block.corner[plane][i];
  const T* upper = lower + block.row_step[plane][i];
  const int32_t step = block.column_step[plane][i];
  return {load_row<kWidth>(lower), load_row<kWidth>(lower + step), load_row<kWidth>(upper),
          load_row<kWidth>(upper + step)};
}

// Their interpolation: the feature of the point.
template <int kWidth, typename T>
VTOK_FUNCTION Row<real<T>, kWidth> interpolate_row(const T* plane_data, int plane,
                                                   const PointBlock<real<T>>& block, int i) {
  const auto at = load_corners<kWidth>(plane_data, plane, block, i);
  return triplane_interpolate(at.ll, at.lu, at.ul, at.uu,
                              block.fraction[triplane_row_axis(plane)][i],
                              block.fraction[triplane_column_axis(plane)][i]);
}

// Calls function(channels) with the number of channels, as a compile-time constant where it is
// kRow.
template <typename Function>
VTOK_FUNCTION void with_channels(int64_t channels, const Function& function) {
  if (channels == kRow) {
    function(std::integral_constant<int64_t, kRow>());
  } else {
    function(channels);
  }
}

// Calls function(std::integral_constant<int, width>, channel) until all channels are done.
template <typename Function>
VTOK_FUNCTION void for_each_row(int64_t channels, const Function& function) {
  int64_t channel = 0;
  for (; channel + kRow <= channels; channel += kRow) {
    function(std::integral_constant<int, kRow>(), channel);
  }
  for (; channel < channels; ++channel) function(std::integral_constant<int, 1>(), channel);
}

template <typename T>
struct PlanePointers {
  const T* data[kTriplanePlanes];

  PlanePointers(const TensorView (&planes)[kTriplanePlanes], const TriplaneShape& shape,
                int64_t batch) {
    for (int p = 0; p < kTriplanePlanes; ++p) {
      data[p] = planes[p].data_as<T>() + batch * triplane_elements(shape, p);
    }
  }
};

// Features (points x channels) below which a second thread costs more than it gains.
constexpr int64_t kGrainFeatures = 4096;

static int64_t blocks_of(int64_t num_points) {
  return (num_points + kBlock - 1) / kBlock;
}

// Calls function(batch, first, count) for every block of points, on several threads.
template <typename Function>
static void for_each_block(const TriplaneShape& shape, int num_threads, const Function& function) {
  const int64_t per_entry = blocks_of(shape.num_points);
  const int64_t grain = larger(1, kGrainFeatures / (kBlock * shape.channels));
  parallel_for(shape.batch * per_entry, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % per_entry * kBlock;
      const int64_t count = smaller(kBlock, shape.num_points - first);
      function(index / per_entry, first, static_cast<int>(count));
    }
  });
}

// Calls function(std::integral_constant<TriplaneReduce, reduce>).
template <typename Function>
static void dispatch_reduce(TriplaneReduce reduce, const Function& function) {
  switch (reduce) {
    case TriplaneReduce::kCat:
      return function(std::integral_constant<TriplaneReduce, TriplaneReduce::kCat>());
    case TriplaneReduce::kSum:
      return function(std::integral_constant<TriplaneReduce, TriplaneReduce::kSum>());
    case TriplaneReduce::kProduct:
      return function(std::integral_constant<TriplaneReduce, TriplaneReduce::kProduct>());
  }
}

}  // namespace vtok::VTOK_ISA
