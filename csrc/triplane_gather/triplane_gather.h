// Bilinear lookup of points in three feature planes (a triplane): what the CPU and the CUDA kernels
// are told. The arithmetic is in triplane_gather_math.h.
//
// Axes are numbered t = 0, x = 1, y = 2 and planes xy = 0, yt = 1, xt = 2, the order of CoordTok.
// Planes, outputs and gradients are contiguous; coordinates may have any strides.
#pragma once

#include <cstdint>

#include "../core/host_device.h"
#include "../core/stream.h"
#include "../core/tensor_view.h"

namespace vtok {

constexpr int kTriplaneAxes = 3;
constexpr int kTriplanePlanes = 3;

// Cells along an axis: R - 1 is then exact as float32. Beyond, it could be rounded up, and a
// coordinate of 1 would lie behind the last cell.
constexpr int64_t kTriplaneMaxResolution = int64_t{1} << 24;
// Channels of a plane: offsets in the output of a block of 128 points then fit into 31 bits.
constexpr int64_t kTriplaneMaxChannels = int64_t{1} << 22;

// The axes along the rows and the columns of a plane.
VTOK_FUNCTION int triplane_row_axis(int plane) {
  return plane == 0 ? 1 : 0;
}
VTOK_FUNCTION int triplane_column_axis(int plane) {
  return plane == 2 ? 1 : 2;
}

// How the three features of a point become its output.
enum class TriplaneReduce { kCat, kSum, kProduct };

VTOK_FUNCTION int64_t triplane_out_channels(TriplaneReduce reduce, int64_t channels) {
  return reduce == TriplaneReduce::kCat ? kTriplanePlanes * channels : channels;
}

struct TriplaneShape {
  int64_t batch;
  int64_t num_points;
  int64_t channels;
  int64_t resolution[kTriplaneAxes];  // cells along t, x, y
};

VTOK_FUNCTION int64_t triplane_num_cells(const TriplaneShape& shape, int plane) {
  return shape.resolution[triplane_row_axis(plane)] * shape.resolution[triplane_column_axis(plane)];
}

// Elements of one plane of one batch entry.
VTOK_FUNCTION int64_t triplane_elements(const TriplaneShape& shape, int plane) {
  return triplane_num_cells(shape, plane) * shape.channels;
}

// Elements of the planes before `plane`: where it lies in a joint buffer of one batch entry. All
// planes together have triplane_offset(shape, kTriplanePlanes).
VTOK_FUNCTION int64_t triplane_offset(const TriplaneShape& shape, int plane) {
  int64_t offset = 0;
  for (int p = 0; p < plane; ++p) offset += triplane_elements(shape, p);
  return offset;
}

// Where the points are. Without a lattice, axis a of point n of batch entry b is
// axis[a][b * batch_stride + n * stride[a]]. With one, the points are the product of three lists,
// shared by the batch: n = (i_t * size_x + i_x) * size_y + i_y is at axis[a][i_a * stride[a]].
struct TriplanePoints {
  const void* axis[kTriplaneAxes];
  DType dtype;
  int64_t batch_stride;
  int64_t stride[kTriplaneAxes];
  bool is_lattice;
  int64_t lattice_size[kTriplaneAxes];
  // Integer positions i are divided by this (grid size - 1, at least 1); 1 for real coordinates.
  int64_t divisor[kTriplaneAxes];
};

struct TriplaneForward {
  TriplaneShape shape;
  TriplanePoints points;
  TriplaneReduce reduce;
  TensorView planes[kTriplanePlanes];  // [B, R0, R1, C], [B, Rt, R1, C], [B, Rt, R0, C]
  OutputView out;                      // [B, N, 3 * C] for kCat, else [B, N, C]
  int num_threads;
};

// A gradient that nobody needs is a view without a pointer.
struct TriplaneBackward {
  TriplaneShape shape;
  TriplanePoints points;
  TriplaneReduce reduce;
  TensorView planes[kTriplanePlanes];       // as forward
  TensorView grad_out;                      // as out
  OutputView grad_planes[kTriplanePlanes];  // as planes
  OutputView grad_coords;                   // [B, N, 3]
  WorkspaceView workspace;  // float32 (float64 for float64 planes): the chunks' planes
                            // [B, chunks, cells of all planes * C], then on CUDA
                            // for kProduct the features' gradients [B, N, 3 * C]
  int num_threads;
};

// Note [Sums in chunks]
// Many points add to few cells: 32,768 points to 1,280 cells in CoordTok. Atomic additions would
// queue up and make the last bits depend on timing. Instead the points of a batch entry are cut
// into chunks, each chunk is added into planes of its own, without atomics, and the chunks' planes
// are added in order. The number of chunks follows from shapes alone, so gradients are the same for
// every number of threads and in every run. A chunk has at least as many points as there are cells,
// so that adding the planes costs less than adding the points; there are enough chunks to occupy
// 32 CPU threads, or 512 blocks.
VTOK_FUNCTION int64_t triplane_gather_chunks(const TriplaneShape& shape, int64_t min_points,
                                             int64_t max_tasks) {
  int64_t cells = 0;
  for (int p = 0; p < kTriplanePlanes; ++p) cells += triplane_num_cells(shape, p);
  const int64_t by_points = shape.num_points / (cells > min_points ? cells : min_points);
  const int64_t entries = shape.batch < 1 ? 1 : shape.batch;
  const int64_t by_tasks = (max_tasks + entries - 1) / entries;
  const int64_t chunks = by_points < by_tasks ? by_points : by_tasks;
  return chunks < 1 ? 1 : chunks;
}

VTOK_FUNCTION int64_t triplane_gather_chunks_cpu(const TriplaneShape& shape) {
  return triplane_gather_chunks(shape, 2048, 32);
}

VTOK_FUNCTION int64_t triplane_gather_chunks_cuda(const TriplaneShape& shape) {
  return triplane_gather_chunks(shape, 512, 512 / kTriplanePlanes);
}

// Whether a single chunk is added into the gradients themselves, without a workspace.
VTOK_FUNCTION bool triplane_gather_is_direct_cpu(const TriplaneShape& shape, DType dtype) {
  const bool is_real = dtype == DType::kFloat32 || dtype == DType::kFloat64;
  return is_real && triplane_gather_chunks_cpu(shape) == 1;
}

// Reports a NaN coordinate of `axis`; on a lattice, which has no batch, only the axis is named.
[[noreturn]] void throw_triplane_nan(bool is_lattice, int64_t batch, int64_t point, int axis);

void triplane_gather_forward_cpu(const TriplaneForward& params);
void triplane_gather_backward_cpu(const TriplaneBackward& params);

void triplane_gather_forward_cuda(const TriplaneForward& params, Stream stream);
void triplane_gather_backward_cuda(const TriplaneBackward& params, Stream stream);

}  // namespace vtok
