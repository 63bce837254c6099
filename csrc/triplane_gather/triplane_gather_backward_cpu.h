// Gradients of the triplane lookup on the CPU. Included by triplane_gather_cpu.cpp, once per
// instruction set.
//
// To the planes: many points add to few cells. Every chunk of points adds into planes of its own,
// and these are then added in the order of the chunks: see Note [Sums in chunks].
// To the coordinates: every point is independent.
#pragma once

#include "triplane_gather_block_cpu.h"

namespace vtok::VTOK_ISA {

// Gradient of the feature that point i has in `plane`.
template <TriplaneReduce kReduce, int kWidth, typename T>
VTOK_FUNCTION Row<real<T>, kWidth> feature_gradient(const T* grad_out,  // [3 * C] or [C]
                                                    const PlanePointers<T>& planes, int plane,
                                                    int64_t channels, int64_t channel,
                                                    const PointBlock<real<T>>& block, int i) {
  if constexpr (kReduce == TriplaneReduce::kCat) {
    return load_row<kWidth>(grad_out + plane * channels + channel);
  } else if constexpr (kReduce == TriplaneReduce::kSum) {
    return load_row<kWidth>(grad_out + channel);
  } else {
    const int a = (plane + 1) % kTriplanePlanes, b = (plane + 2) % kTriplanePlanes;
    return load_row<kWidth>(grad_out + channel) *
           (interpolate_row<kWidth>(planes.data[a] + channel, a, block, i) *
            interpolate_row<kWidth>(planes.data[b] + channel, b, block, i));
  }
}

// Adds a point's gradient to the four cells around it, which may be the same cell twice.
template <int kWidth, typename Real>
VTOK_FUNCTION void add_to_corners(Real* plane_data, int plane, const PointBlock<Real>& block, int i,
                                  Row<Real, kWidth> gradient) {
  const Real row_fraction = block.fraction[triplane_row_axis(plane)][i];
  const Real column_fraction = block.fraction[triplane_column_axis(plane)][i];
  const int32_t step = block.column_step[plane][i];
  Real* lower = plane_data + block.corner[plane][i];
  Real* upper = lower + block.row_step[plane][i];
  const auto add = [&](Real* cell, Real weight) {
    store_row<kWidth>(cell, load_row<kWidth>(cell) + gradient * weight);
  };
  add(lower, (1 - row_fraction) * (1 - column_fraction));
  add(lower + step, (1 - row_fraction) * column_fraction);
  add(upper, row_fraction * (1 - column_fraction));
  add(upper + step, row_fraction * column_fraction);
}

// Plane by plane, so that one plane of sums (16 KB in CoordTok) is in the L1 cache at a time.
template <TriplaneReduce kReduce, typename T>
static void scatter_block(const PlanePointers<T>& planes, int plane, int64_t channels,
                          const PointBlock<real<T>>& block, int count, const T* grad_out,
                          real<T>* sums) {
  with_channels(channels, [&](auto num_channels) {
    const int64_t out_channels = triplane_out_channels(kReduce, num_channels);
    for (int i = 0; i < count; ++i) {
      for_each_row(num_channels, [&](auto width, int64_t channel) {
        constexpr int kWidth = decltype(width)::value;
        add_to_corners<kWidth>(
            sums + channel, plane, block, i,
            feature_gradient<kReduce, kWidth>(grad_out + i * out_channels, planes, plane,
                                              num_channels, channel, block, i));
      });
    }
  });
}

template <typename Real>
static void fill_zero(Real* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

// Adds one chunk's points into `sums`, which it sets to zero first.
template <TriplaneReduce kReduce, typename T>
static void scatter_chunk(const TriplaneBackward& params, int64_t batch, int64_t chunk,
                          real<T>* const (&sums)[kTriplanePlanes]) {
  const TriplaneShape& shape = params.shape;
  for (int p = 0; p < kTriplanePlanes; ++p) {
    if (sums[p] != nullptr) fill_zero(sums[p], triplane_elements(shape, p));
  }
  const PlanePointers<T> planes(params.planes, shape, batch);
  const int64_t num_chunks = triplane_gather_chunks_cpu(shape);
  const int64_t num_blocks = blocks_of(shape.num_points);
  const int64_t end = smaller(num_blocks * (chunk + 1) / num_chunks * kBlock, shape.num_points);
  const T* grad_out =
      params.grad_out.data_as<T>() +
      batch * shape.num_points * triplane_out_channels(params.reduce, shape.channels);
  PointBlock<real<T>> block;
  for (int64_t first = num_blocks * chunk / num_chunks * kBlock; first < end; first += kBlock) {
    const int count = static_cast<int>(smaller(kBlock, end - first));
    fill_block(shape, params.points, batch, first, count, block);
    const T* block_grad_out =
        grad_out + first * triplane_out_channels(params.reduce, shape.channels);
    for (int p = 0; p < kTriplanePlanes; ++p) {
      if (sums[p] == nullptr) continue;
      scatter_block<kReduce>(planes, p, shape.channels, block, count, block_grad_out, sums[p]);
    }
  }
}

// Adds the chunks of a batch entry in order: elements [begin, end) of one plane.
template <typename T>
static void add_chunks(const real<T>* partial, int64_t num_chunks, int64_t chunk_stride,
                       int64_t begin, int64_t end, T* sum) {
  constexpr int kRun = 256;
  for (int64_t first = begin; first < end; first += kRun) {
    const int count = static_cast<int>(smaller(kRun, end - first));
    real<T> run[kRun];
    for (int e = 0; e < count; ++e) run[e] = partial[first + e];
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
      const real<T>* other = partial + chunk * chunk_stride + first;
      for (int e = 0; e < count; ++e) run[e] += other[e];
    }
    for (int e = 0; e < count; ++e) store(sum + first + e, run[e]);
  }
}

template <TriplaneReduce kReduce, typename T>
static void backward_planes(const TriplaneBackward& params) {
  const TriplaneShape& shape = params.shape;
  const int64_t num_chunks = triplane_gather_chunks_cpu(shape);
  const int64_t stride = triplane_offset(shape, kTriplanePlanes);
  const bool is_direct = triplane_gather_is_direct_cpu(shape, params.grad_out.dtype);
  T* grad_planes[kTriplanePlanes];
  for (int p = 0; p < kTriplanePlanes; ++p) {
    const OutputView& view = params.grad_planes[p];
    grad_planes[p] = view.data == nullptr ? nullptr : view.data_as<T>();
  }
  real<T>* workspace = is_direct ? nullptr : params.workspace.data_as<real<T>>();
  parallel_for(shape.batch * num_chunks, 1, params.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      real<T>* sums[kTriplanePlanes] = {};
      for (int p = 0; p < kTriplanePlanes; ++p) {
        if (grad_planes[p] == nullptr) continue;
        if constexpr (std::is_same_v<T, real<T>>) {
          if (is_direct) sums[p] = grad_planes[p] + index * triplane_elements(shape, p);
        }
        if (!is_direct) sums[p] = workspace + index * stride + triplane_offset(shape, p);
      }
      scatter_chunk<kReduce, T>(params, index / num_chunks, index % num_chunks, sums);
    }
  });
  if (is_direct) return;
  constexpr int64_t kRangeElements = 4096;  // about 2 us for 16 chunks
  for (int p = 0; p < kTriplanePlanes; ++p) {
    if (grad_planes[p] == nullptr) continue;
    const int64_t elements = triplane_elements(shape, p);
    const int64_t ranges = (elements + kRangeElements - 1) / kRangeElements;
    parallel_for(shape.batch * ranges, 2, params.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t batch = index / ranges, first = index % ranges * kRangeElements;
        add_chunks(workspace + batch * num_chunks * stride + triplane_offset(shape, p), num_chunks,
                   stride, first, smaller(first + kRangeElements, elements),
                   grad_planes[p] + batch * elements);
      }
    });
  }
}

template <typename Real, int kWidth>
VTOK_FUNCTION Real sum_of(Row<Real, kWidth> row) {
  Real sum = row[0];
  for (int c = 1; c < kWidth; ++c) sum += row[c];
  return sum;
}

// Adds a plane's share of the gradient with respect to the positions of point i on its two axes.
template <int kWidth, typename T>
VTOK_FUNCTION void add_position_gradient(const T* plane_data, int plane,
                                         const PointBlock<real<T>>& block, int i,
                                         Row<real<T>, kWidth> gradient,
                                         real<T> (&sums)[kTriplaneAxes]) {
  const int row_axis = triplane_row_axis(plane), column_axis = triplane_column_axis(plane);
  const auto at = load_corners<kWidth>(plane_data, plane, block, i);
  sums[row_axis] += sum_of<real<T>, kWidth>(
      gradient * triplane_row_slope(at.ll, at.lu, at.ul, at.uu, block.fraction[column_axis][i]));
  sums[column_axis] += sum_of<real<T>, kWidth>(
      gradient * triplane_column_slope(at.ll, at.lu, at.ul, at.uu, block.fraction[row_axis][i]));
}

template <TriplaneReduce kReduce, typename T>
static void backward_coords(const TriplaneBackward& params) {
  using Real = real<T>;
  const TriplaneShape& shape = params.shape;
  const int64_t out_channels = triplane_out_channels(params.reduce, shape.channels);
  for_each_block(shape, params.num_threads, [&](int64_t batch, int64_t first, int count) {
    PointBlock<Real> block;
    fill_block(shape, params.points, batch, first, count, block);
    const PlanePointers<T> planes(params.planes, shape, batch);
    const int64_t first_point = batch * shape.num_points + first;
    const T* grad_out = params.grad_out.data_as<T>() + first_point * out_channels;
    Real* grad_coords = params.grad_coords.data_as<Real>() + first_point * kTriplaneAxes;
    for (int i = 0; i < count; ++i) {
      Real sums[kTriplaneAxes] = {};
      for_each_row(shape.channels, [&](auto width, int64_t channel) {
        constexpr int kWidth = decltype(width)::value;
        for (int p = 0; p < kTriplanePlanes; ++p) {
          add_position_gradient<kWidth>(
              planes.data[p] + channel, p, block, i,
              feature_gradient<kReduce, kWidth>(grad_out + i * out_channels, planes, p,
                                                shape.channels, channel, block, i),
              sums);
        }
      });
      for (int axis = 0; axis < kTriplaneAxes; ++axis) {
        const int32_t resolution = static_cast<int32_t>(shape.resolution[axis]);
        grad_coords[i * kTriplaneAxes + axis] =
            sums[axis] * triplane_position_slope(block.coordinate[axis][i], resolution);
      }
    }
  });
}

}  // namespace vtok::VTOK_ISA
