// Gradients of the triplane lookup to the planes on CUDA, without atomic additions: see Note [Sums
// in chunks]. Two launches:
//
//   scatter  a block owns a tile of one plane (kSlab channels of a rectangle of cells, usually the
//            whole plane) and one chunk of the points. Each of its warps has a copy of the tile in
//            shared memory and adds its points one after the other, a lane per corner and channel:
//            32 lanes hit 32 different words, so plain additions do. At the end the copies are
//            added in order and written to the workspace. Float atomics in shared memory would be
//            compare-and-swap loops, and thousands of points would meet in 1,280 cells.
//   finish   adds the chunks in order and converts.
//
// The gradients are read once, in pieces of kSlab channels: whole 32-byte sectors for float32, half
// ones for half types, whose other half the block of the neighbouring plane or slab finds in L2.
// Expected to be bound by the latency of a shared memory load, an addition and a store per point
// and warp; the gradients of kPrefetch points are loaded ahead.
#include <algorithm>
#include <type_traits>

#include "triplane_gather_points.cuh"

namespace vtok {
namespace {

constexpr int kLanes = 32;  // of a warp: kSlab channels x 4 corners
constexpr int kMaxWarps = 8;
constexpr int kMaxTileColumns = 512;
// Tiles of all warps of a block: two blocks fit into the 227 KB of sm_90.
constexpr int kTilesBytes = 92 << 10;
constexpr int kMaxTileBytes = kTilesBytes / 2;
static_assert(kSlab * 4 == kLanes, "a lane per corner and channel");
static_assert(kMaxTileColumns * kSlab * 4 <= kMaxTileBytes, "a tile has at least one row");

// How a plane is cut into tiles.
struct Tiling {
  int rows, columns;     // cells of a tile
  int row_stride;        // floats from row to row of a tile: 16 modulo 32, so that the corners of
                         // a point lie in different banks
  int tiles_x, tiles_y;  // tiles along the columns and the rows
  int num_warps;
  int num_slabs;
};

Tiling make_tiling(int64_t plane_rows, int64_t plane_columns, int64_t channels) {
  Tiling tiling{};
  tiling.columns =
      static_cast<int>(plane_columns < kMaxTileColumns ? plane_columns : kMaxTileColumns);
  const int unpadded = tiling.columns * kSlab;
  tiling.row_stride = unpadded + (48 - unpadded % 32) % 32;
  const int row_bytes = tiling.row_stride * static_cast<int>(sizeof(float));
  const int most_rows = kMaxTileBytes / row_bytes > 0 ? kMaxTileBytes / row_bytes : 1;
  tiling.rows = static_cast<int>(plane_rows < most_rows ? plane_rows : most_rows);
  tiling.tiles_x = static_cast<int>((plane_columns + tiling.columns - 1) / tiling.columns);
  tiling.tiles_y = static_cast<int>((plane_rows + tiling.rows - 1) / tiling.rows);
  const int warps = kTilesBytes / (tiling.rows * row_bytes);
  tiling.num_warps = warps < 1 ? 1 : (warps > kMaxWarps ? kMaxWarps : warps);
  tiling.num_slabs = static_cast<int>((channels + kSlab - 1) / kSlab);
  return tiling;
}

// A point as its warp reads it from shared memory, 16 bytes.
struct alignas(16) StagedPoint {
  int16_t row, column;  // lower cell relative to the tile, -1 if it lies just before it
  int point;            // in the group of 32
  float row_fraction, column_fraction;
};
static_assert(sizeof(StagedPoint) == 16, "one shared memory access");
// Gradients in flight per lane: a load from memory takes several hundred cycles, an addition to a
// tile some forty.
constexpr int kPrefetch = 8;

// The part of a plane that a block owns, and the chunk that it adds.
struct TileOfBlock {
  int first_row, first_column, num_rows, num_columns;
  int first_channel, num_channels;
  unsigned chunk;
  int64_t batch;
};

struct ScatterPlan {
  Tiling tiling[kTriplanePlanes];   // num_warps is 0 for a plane without a gradient
  int64_t offset[kTriplanePlanes];  // of the plane in the workspace of a chunk
  int64_t chunk_elements;
  unsigned num_chunks;
  int channels;
  int64_t batch;
};

__device__ __forceinline__ TileOfBlock tile_of_block(const Tiling& tiling, const ScatterPlan& plan,
                                                     int plane_rows, int plane_columns) {
  unsigned rest = blockIdx.x;
  const int tile_x = rest % tiling.tiles_x;
  rest /= tiling.tiles_x;
  const int tile_y = rest % tiling.tiles_y;
  rest /= tiling.tiles_y;
  const int slab = rest % tiling.num_slabs;
  rest /= tiling.num_slabs;
  TileOfBlock tile;
  tile.first_row = tile_y * tiling.rows;
  tile.first_column = tile_x * tiling.columns;
  tile.num_rows = min(tiling.rows, plane_rows - tile.first_row);
  tile.num_columns = min(tiling.columns, plane_columns - tile.first_column);
  tile.first_channel = slab * kSlab;
  tile.num_channels = min(kSlab, plan.channels - tile.first_channel);
  tile.chunk = rest % plan.num_chunks;
  tile.batch = rest / plan.num_chunks;
  return tile;
}

// Locates the 32 points of a group and puts those that touch the tile in front, in their order.
// Returns how many.
template <typename Coord>
__device__ __forceinline__ int stage_group(const DevicePoints<Coord>& points, int plane,
                                           const TileOfBlock& tile, unsigned group,
                                           StagedPoint* staged) {  // [32]
  const int lane = threadIdx.x % kLanes;
  const unsigned n = group * kLanes + lane;
  StagedPoint point{};
  bool touches = false;
  if (n < points.num_points) {
    const int row_axis = triplane_row_axis(plane), column_axis = triplane_column_axis(plane);
    const AxisPosition<float> row = triplane_locate(coordinate_of(points, tile.batch, n, row_axis),
                                                    pick(points.resolution, row_axis));
    const AxisPosition<float> column = triplane_locate(
        coordinate_of(points, tile.batch, n, column_axis), pick(points.resolution, column_axis));
    const int tile_row = row.lower - tile.first_row;
    const int tile_column = column.lower - tile.first_column;
    touches = tile_row >= -1 && tile_row < tile.num_rows && tile_column >= -1 &&
              tile_column < tile.num_columns;
    point = {static_cast<int16_t>(touches ? tile_row : 0),
             static_cast<int16_t>(touches ? tile_column : 0), lane, row.fraction, column.fraction};
  }
  const unsigned touching = __ballot_sync(0xffffffffu, touches);
  if (touches) store_vector(staged + __popc(touching & ((1u << lane) - 1)), point);
  __syncwarp();
  return __popc(touching);
}

// Adds the staged points into the warp's copy of the tile, one after the other.
template <typename Grad>
__device__ __forceinline__ void add_group(const Grad* __restrict__ gradients,  // of the group
                                          int point_stride, const TileOfBlock& tile, int row_stride,
                                          const StagedPoint* staged, int count, float* copy) {
  const int lane = threadIdx.x % kLanes;
  const int channel = lane % kSlab, corner = lane / kSlab;
  const int right = corner % 2, below = corner / 2;
  const bool has_channel = channel < tile.num_channels;
  for (int first = 0; first < count; first += kPrefetch) {
    float gradient[kPrefetch];
#pragma unroll
    for (int k = 0; k < kPrefetch; ++k) {
      const bool is_needed = has_channel && first + k < count;
      gradient[k] =
          is_needed ? to_float(gradients[int64_t{staged[first + k].point} * point_stride + channel])
                    : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kPrefetch; ++k) {
      if (first + k >= count) break;
      const StagedPoint point = load_vector<StagedPoint>(staged + first + k);
      const int row = point.row + below, column = point.column + right;
      const bool is_inside = has_channel && row >= 0 && row < tile.num_rows && column >= 0 &&
                             column < tile.num_columns;
      if (is_inside) {
        const float row_weight = below ? point.row_fraction : 1.0f - point.row_fraction;
        const float column_weight = right ? point.column_fraction : 1.0f - point.column_fraction;
        copy[row * row_stride + column * kSlab + channel] +=
            gradient[k] * (row_weight * column_weight);
      }
      __syncwarp();  // the next point may add to the same cells from other lanes
    }
  }
}

template <typename Grad, typename Coord>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    triplane_gather_scatter_kernel(const DevicePoints<Coord> points,
                                   const FeatureGradients<Grad> gradients, const ScatterPlan plan,
                                   float* __restrict__ workspace) {  // [B, chunks, cells * C]
  VTOK_DYNAMIC_SHARED(float, copies);  // [num_warps, rows, row_stride]
  VTOK_SHARED(StagedPoint, staged, kMaxWarps * kLanes);
  const int plane = blockIdx.y;
  const Tiling tiling = pick(plan.tiling, plane);
  const unsigned num_blocks = static_cast<unsigned>(plan.batch) * plan.num_chunks *
                              tiling.num_slabs * tiling.tiles_y * tiling.tiles_x;
  if (tiling.num_warps == 0 || blockIdx.x >= num_blocks) return;
  const int plane_columns = pick(points.resolution, triplane_column_axis(plane));
  const TileOfBlock tile =
      tile_of_block(tiling, plan, pick(points.resolution, triplane_row_axis(plane)), plane_columns);
  const int copy_elements = tiling.rows * tiling.row_stride;
  for (int e = threadIdx.x; e < tiling.num_warps * copy_elements; e += blockDim.x) copies[e] = 0;
  __syncthreads();

  const int warp = threadIdx.x / kLanes;
  if (warp < tiling.num_warps) {
    const uint64_t num_groups = (points.num_points + kLanes - 1) / kLanes;
    const unsigned begin = static_cast<unsigned>(num_groups * tile.chunk / plan.num_chunks);
    const unsigned end = static_cast<unsigned>(num_groups * (tile.chunk + 1) / plan.num_chunks);
    StagedPoint* warp_staged = staged + warp * kLanes;
    for (unsigned group = begin + warp; group < end; group += tiling.num_warps) {
      const int count = stage_group(points, plane, tile, group, warp_staged);
      const int64_t first_point = tile.batch * points.num_points + int64_t{group} * kLanes;
      add_group(gradients.data + first_point * gradients.point_stride +
                    plane * gradients.plane_stride + tile.first_channel,
                gradients.point_stride, tile, tiling.row_stride, warp_staged, count,
                copies + warp * copy_elements);
      __syncwarp();  // every lane has read the staged points
    }
  }
  __syncthreads();

  float* out = workspace + (tile.batch * plan.num_chunks + tile.chunk) * plan.chunk_elements +
               pick(plan.offset, plane);
  const int num_elements = tile.num_rows * tile.num_columns * kSlab;
  for (int e = threadIdx.x; e < num_elements; e += blockDim.x) {
    const int channel = e % kSlab, cell = e / kSlab;
    const int row = cell / tile.num_columns, column = cell - row * tile.num_columns;
    if (channel >= tile.num_channels) continue;
    float sum = 0;
    for (int w = 0; w < tiling.num_warps; ++w) {
      sum += copies[w * copy_elements + row * tiling.row_stride + column * kSlab + channel];
    }
    const int64_t plane_cell =
        int64_t{tile.first_row + row} * plane_columns + tile.first_column + column;
    out[plane_cell * plan.channels + tile.first_channel + channel] = sum;
  }
}

template <typename T>
struct PlaneGradients {
  T* data[kTriplanePlanes];  // null for a plane without a gradient
  int64_t elements[kTriplanePlanes];
};

constexpr int kFinishThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    triplane_gather_finish_kernel(const PlaneGradients<T> gradients, const ScatterPlan plan,
                                  const float* __restrict__ workspace) {
  const int plane = blockIdx.y;
  const int64_t elements = pick(gradients.elements, plane);
  T* out = pick(gradients.data, plane);
  const int64_t index = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (out == nullptr || index >= plan.batch * elements) return;
  const int64_t batch = index / elements;
  const float* chunk = workspace + batch * plan.num_chunks * plan.chunk_elements +
                       pick(plan.offset, plane) + (index - batch * elements);
  float sum = 0;
#pragma unroll 4
  for (unsigned k = 0; k < plan.num_chunks; ++k) sum += chunk[k * plan.chunk_elements];
  out[index] = from_float<T>(sum);
}

// Tilings of the planes that need a gradient.
ScatterPlan make_plan(const TriplaneBackward& params) {
  const TriplaneShape& shape = params.shape;
  ScatterPlan plan{};
  for (int p = 0; p < kTriplanePlanes; ++p) {
    plan.offset[p] = triplane_offset(shape, p);
    if (params.grad_planes[p].data == nullptr) continue;
    plan.tiling[p] = make_tiling(shape.resolution[triplane_row_axis(p)],
                                 shape.resolution[triplane_column_axis(p)], shape.channels);
  }
  plan.chunk_elements = triplane_offset(shape, kTriplanePlanes);
  plan.num_chunks = static_cast<unsigned>(triplane_gather_chunks_cuda(shape));
  plan.channels = static_cast<int>(shape.channels);
  plan.batch = shape.batch;
  return plan;
}

unsigned checked_blocks(int64_t blocks) {
  VTOK_CHECK_VALUE(blocks <= 0x7fffffff,
                   "triplane_gather backward: planes are too large for one launch, got ", blocks,
                   " blocks");
  return static_cast<unsigned>(blocks);
}

void scatter(const TriplaneBackward& params, const ScatterPlan& plan,
             const FeatureGradientView& gradients, float* workspace, Stream stream) {
  int64_t blocks = 0, shared_bytes = 0;
  int num_warps = 0;
  for (const Tiling& tiling : plan.tiling) {
    const int64_t tiles = int64_t{tiling.num_slabs} * tiling.tiles_x * tiling.tiles_y;
    const int64_t copies = int64_t{tiling.num_warps} * tiling.rows * tiling.row_stride;
    blocks = std::max(blocks, plan.batch * plan.num_chunks * tiles);
    shared_bytes = std::max(shared_bytes, copies * int64_t{sizeof(float)});
    num_warps = std::max(num_warps, tiling.num_warps);
  }
  dispatch_floating_cuda("triplane_gather backward", "grad_out", gradients.dtype, [&](auto type) {
    using Grad = typename decltype(type)::type;
    const FeatureGradients<Grad> typed = gradients.as<Grad>();
    dispatch_points(params.shape, params.points, [&](const auto& points) {
      using Coord = typename std::decay_t<decltype(points)>::Value;
      VTOK_LAUNCH((triplane_gather_scatter_kernel<Grad, Coord>),
                  dim3(checked_blocks(blocks), kTriplanePlanes), dim3(num_warps * kLanes),
                  static_cast<size_t>(shared_bytes), stream, points, typed, plan, workspace);
    });
  });
}

}  // namespace

void triplane_gather_planes_cuda(const TriplaneBackward& params,
                                 const FeatureGradientView& gradients, Stream stream) {
  const ScatterPlan plan = make_plan(params);
  float* workspace = params.workspace.data_as<float>();
  scatter(params, plan, gradients, workspace, stream);
  dispatch_floating_cuda(
      "triplane_gather backward", "planes", params.planes[0].dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        PlaneGradients<T> grad_planes{};
        int64_t most_elements = 0;
        for (int p = 0; p < kTriplanePlanes; ++p) {
          if (params.grad_planes[p].data == nullptr) continue;
          grad_planes.data[p] = params.grad_planes[p].data_as<T>();
          grad_planes.elements[p] = triplane_elements(params.shape, p);
          most_elements = std::max(most_elements, grad_planes.elements[p]);
        }
        const int64_t blocks = (plan.batch * most_elements + kFinishThreads - 1) / kFinishThreads;
        VTOK_LAUNCH((triplane_gather_finish_kernel<T>),
                    dim3(checked_blocks(blocks), kTriplanePlanes), dim3(kFinishThreads), 0, stream,
                    grad_planes, plan, workspace);
      });
}

}  // namespace vtok
