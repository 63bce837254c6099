// Triplane lookup on the CPU. Points go in blocks of kBlock: first their positions, vectorised over
// points, then their features, vectorised over channels.
//
// Forward: every point is independent. A lattice that is concatenated computes each feature once,
// where it first occurs in the output, and copies it from there: the xy features of a frame from
// the frame before, the yt features of a row of points from the frame's first row, the xt features
// of a point from its row's first point. The bits are those of independent points.
// The backward pass is in triplane_gather_backward_cpu.h.
#include "triplane_gather_backward_cpu.h"

namespace vtok::VTOK_ISA {

// Frames from which on a lattice is worth its copies: fewer reuse little and occupy few threads.
constexpr int64_t kMinLatticeFrames = 4;

// Features of one plane; those of neighbouring points are `out_stride` apart.
template <typename T>
static void gather_plane(const T* plane_data, int plane, int64_t channels,
                         const PointBlock<real<T>>& block, int count, T* out, int64_t out_stride) {
  with_channels(channels, [&](auto num_channels) {
    for (int i = 0; i < count; ++i) {
      for_each_row(num_channels, [&](auto width, int64_t channel) {
        constexpr int kWidth = decltype(width)::value;
        store_row<kWidth>(out + i * out_stride + channel,
                          interpolate_row<kWidth>(plane_data + channel, plane, block, i));
      });
    }
  });
}

// Sum or product of the features of the three planes.
template <TriplaneReduce kReduce, typename T>
static void gather_reduced(const PlanePointers<T>& planes, int64_t channels,
                           const PointBlock<real<T>>& block, int count, T* out) {
  with_channels(channels, [&](auto num_channels) {
    for (int i = 0; i < count; ++i) {
      for_each_row(num_channels, [&](auto width, int64_t channel) {
        constexpr int kWidth = decltype(width)::value;
        const auto xy = interpolate_row<kWidth>(planes.data[0] + channel, 0, block, i);
        const auto yt = interpolate_row<kWidth>(planes.data[1] + channel, 1, block, i);
        const auto xt = interpolate_row<kWidth>(planes.data[2] + channel, 2, block, i);
        T* point_out = out + i * num_channels + channel;
        if constexpr (kReduce == TriplaneReduce::kSum) {
          store_row<kWidth>(point_out, xy + yt + xt);
        } else {
          store_row<kWidth>(point_out, xy * yt * xt);
        }
      });
    }
  });
}

// Features of `plane` for every point of a lattice; those of neighbouring points are `out_stride`
// apart.
template <typename T>
static void gather_lattice(const TriplaneShape& shape, const TriplanePoints& points, int64_t batch,
                           const PlanePointers<T>& planes, int plane, T* out, int64_t out_stride) {
  const int64_t num_points =
      points.lattice_size[0] * points.lattice_size[1] * points.lattice_size[2];
  PointBlock<real<T>> block;
  for (int64_t first = 0; first < num_points; first += kBlock) {
    const int count = static_cast<int>(smaller(kBlock, num_points - first));
    fill_block(shape, points, batch, first, count, block);
    gather_plane(planes.data[plane], plane, shape.channels, block, count,
                 out + first * out_stride + plane * shape.channels, out_stride);
  }
}

// One frame of a concatenated lattice. `previous` is the frame before in the output, or null.
template <typename T>
static void gather_frame(const TriplaneForward& params, int64_t batch, int64_t frame,
                         const PlanePointers<T>& planes, const T* previous, T* out) {
  const TriplaneShape& shape = params.shape;
  const int64_t size_x = params.points.lattice_size[1], size_y = params.points.lattice_size[2];
  const int64_t channels = shape.channels, stride = 3 * channels;
  TriplanePoints points = params.points;
  points.axis[0] = static_cast<const char*>(points.axis[0]) +
                   frame * points.stride[0] * static_cast<int64_t>(size_of(points.dtype));
  points.lattice_size[0] = 1;
  if (previous == nullptr) gather_lattice(shape, points, batch, planes, 0, out, stride);
  points.lattice_size[1] = 1;
  gather_lattice(shape, points, batch, planes, 1, out, stride);
  points.lattice_size[1] = size_x;
  points.lattice_size[2] = 1;
  gather_lattice(shape, points, batch, planes, 2, out, stride * size_y);
  with_channels(channels, [&](auto num_channels) {
    const int64_t point_elements = 3 * num_channels;
    const auto copy = [&](const T* from, T* to) { memcpy(to, from, num_channels * sizeof(T)); };
    for (int64_t x = 0; x < size_x; ++x) {
      T* row = out + x * size_y * point_elements;
      for (int64_t y = 0; y < size_y; ++y) {
        T* point = row + y * point_elements;
        if (previous != nullptr) copy(previous + (point - out), point);
        if (x > 0) copy(out + y * point_elements + num_channels, point + num_channels);
        if (y > 0) copy(row + 2 * num_channels, point + 2 * num_channels);
      }
    }
  });
}

template <typename T>
static void forward_lattice(const TriplaneForward& params) {
  const int64_t num_frames = params.points.lattice_size[0];
  const int64_t frame_points = params.points.lattice_size[1] * params.points.lattice_size[2];
  const int64_t frame_elements = frame_points * 3 * params.shape.channels;
  const int64_t grain = larger(1, 4 * kGrainFeatures / (frame_points * params.shape.channels));
  T* out = params.out.data_as<T>();
  parallel_for(params.shape.batch * num_frames, grain, params.num_threads,
               [&](int64_t begin, int64_t end) {
                 const T* previous = nullptr;
                 for (int64_t index = begin; index < end; ++index) {
                   const int64_t batch = index / num_frames, frame = index % num_frames;
                   const PlanePointers<T> planes(params.planes, params.shape, batch);
                   if (frame == 0) previous = nullptr;
                   T* frame_out = out + index * frame_elements;
                   gather_frame(params, batch, frame, planes, previous, frame_out);
                   previous = frame_out;
                 }
               });
}

template <TriplaneReduce kReduce, typename T>
static void forward_points(const TriplaneForward& params) {
  const TriplaneShape& shape = params.shape;
  const int64_t out_channels = triplane_out_channels(kReduce, shape.channels);
  T* out = params.out.data_as<T>();
  for_each_block(shape, params.num_threads, [&](int64_t batch, int64_t first, int count) {
    PointBlock<real<T>> block;
    fill_block(shape, params.points, batch, first, count, block);
    const PlanePointers<T> planes(params.planes, shape, batch);
    T* block_out = out + (batch * shape.num_points + first) * out_channels;
    if constexpr (kReduce == TriplaneReduce::kCat) {
      for (int p = 0; p < kTriplanePlanes; ++p) {
        gather_plane(planes.data[p], p, shape.channels, block, count,
                     block_out + p * shape.channels, out_channels);
      }
    } else {
      gather_reduced<kReduce>(planes, shape.channels, block, count, block_out);
    }
  });
}

void triplane_gather_forward(const TriplaneForward& params) {
  dispatch_floating("triplane_gather", "plane_xy", params.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (params.points.is_lattice && params.reduce == TriplaneReduce::kCat &&
        params.points.lattice_size[0] >= kMinLatticeFrames) {
      return forward_lattice<T>(params);
    }
    dispatch_reduce(params.reduce,
                    [&](auto reduce) { forward_points<decltype(reduce)::value, T>(params); });
  });
}

void triplane_gather_backward(const TriplaneBackward& params) {
  bool any_plane = false;
  for (const OutputView& view : params.grad_planes) any_plane = any_plane || view.data != nullptr;
  dispatch_floating("triplane_gather backward", "plane_xy", params.grad_out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_reduce(params.reduce, [&](auto reduce) {
      constexpr TriplaneReduce kReduce = decltype(reduce)::value;
      if (any_plane) backward_planes<kReduce, T>(params);
      if (params.grad_coords.data != nullptr) backward_coords<kReduce, T>(params);
    });
  });
}

}  // namespace vtok::VTOK_ISA

VTOK_CPU_DISPATCH(triplane_gather_forward, TriplaneForward)
VTOK_CPU_DISPATCH(triplane_gather_backward, TriplaneBackward)
