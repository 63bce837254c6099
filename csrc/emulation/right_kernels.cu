// Correct kernels that together use everything the emulation offers. They are also valid CUDA.
#include "../core/launch.cuh"
#include "../core/mma.cuh"
#include "emulation_tests.h"

namespace vtok::emulation_tests {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

__global__ void __launch_bounds__(1024)
    block_sum_kernel(const float* __restrict__ x, float* __restrict__ sums) {
  VTOK_SHARED(float, warp_sums, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float sum = warp_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  const float total = warp_sum(lane < static_cast<int>(blockDim.x / 32) ? warp_sums[lane] : 0.0f);
  if (lane == 0) sums[blockIdx.x] = total;
}

// Tiles of 64 x 64 outputs by 4 warps of 32 x 32, three stages of cp.async.
constexpr int kTile = 64, kStages = 3, kThreads = 128;

// Rows of 64 bytes (32 halves or 16 floats) padded by 16: rows start in different banks and stay
// 16-byte aligned.
template <typename T>
struct TileShape {
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kStride = 80 / sizeof(T);
  static constexpr int kStageElements = kTile * kStride;
};

// Starts copying rows [row, row + 64) x columns [column, column + depth) of `source` [rows, depth
// of the product].
template <typename T>
__device__ void load_tile(T* tile, const T* __restrict__ source, int row, int num_rows, int column,
                          int num_columns) {
  using Shape = TileShape<T>;
  constexpr int kPerChunk = 16 / sizeof(T), kChunks = kTile * 4;
  for (int chunk = threadIdx.x; chunk < kChunks; chunk += kThreads) {
    const int r = chunk / 4, c = chunk % 4 * kPerChunk;
    const bool valid = row + r < num_rows && column + c < num_columns;
    const T* address = source + static_cast<int64_t>(row + r) * num_columns + column + c;
    cp_async<16>(tile + r * Shape::kStride + c, valid ? address : source, valid);
  }
}

// One stage's contribution to the 32 x 32 outputs of this warp: 2 x 4 tiles of 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply_stage(float (&d)[2][4][4], const T* a_tile,
                                               const T* b_tile) {
  constexpr int kStride = TileShape<T>::kStride;
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < TileShape<T>::kDepth; k += 16) {
    uint32_t a[2][4], b[4][2];
    for (int i = 0; i < 2; ++i)
      ldmatrix_x4(a[i], a_tile + (16 * i + lane % 16) * kStride + k + lane / 16 * 8);
    for (int j = 0; j < 4; ++j)
      ldmatrix_x2(b[j], b_tile + (8 * j + lane % 8) * kStride + k + lane / 8 % 2 * 8);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(d[i][j], a[i], b[j]);
    }
  }
}

template <>
__device__ __forceinline__ void multiply_stage<float>(float (&d)[2][4][4], const float* a_tile,
                                                      const float* b_tile) {
  constexpr int kStride = TileShape<float>::kStride;
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int k = 0; k < TileShape<float>::kDepth; k += 8) {
    uint32_t a[2][4], b[4][2];
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part) {
        const int row = 16 * i + group + part % 2 * 8;
        a[i][part] = float_to_tf32(a_tile[row * kStride + k + member + part / 2 * 4]);
      }
    }
    for (int j = 0; j < 4; ++j) {
      for (int part = 0; part < 2; ++part) {
        b[j][part] = float_to_tf32(b_tile[(8 * j + group) * kStride + k + member + part * 4]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) mma_m16n8k8_tf32(d[i][j], a[i], b[j]);
    }
  }
}

__device__ void store_tile(float* __restrict__ c, const float (&d)[2][4][4], int row, int column,
                           int m, int n) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int part = 0; part < 4; ++part) {
        const int r = row + 16 * i + group + part / 2 * 8,
                  s = column + 8 * j + 2 * member + part % 2;
        if (r < m && s < n) c[static_cast<int64_t>(r) * n + s] = d[i][j][part];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) matmul_kernel(const T* __restrict__ a,  // [m, k]
                                                          const T* __restrict__ b,  // [n, k]
                                                          float* __restrict__ c,    // [m, n]
                                                          int m, int n, int k) {
  using Shape = TileShape<T>;
  VTOK_SHARED(T, a_tiles, kStages * Shape::kStageElements);
  VTOK_SHARED(T, b_tiles, kStages * Shape::kStageElements);
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
  const int warp_row = threadIdx.x / 64 * 32, warp_column = threadIdx.x / 32 % 2 * 32;
  const int num_steps = (k + Shape::kDepth - 1) / Shape::kDepth;
  const auto start_step = [&](int step) {
    if (step < num_steps) {
      const int stage = step % kStages * Shape::kStageElements;
      load_tile(a_tiles + stage, a, row, m, step * Shape::kDepth, k);
      load_tile(b_tiles + stage, b, column, n, step * Shape::kDepth, k);
    }
    cp_async_commit();  // also when empty: the number of groups in flight stays the same
  };
  float d[2][4][4] = {};
  for (int step = 0; step < kStages - 1; ++step) start_step(step);
  for (int step = 0; step < num_steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // step's stage has landed for everybody, and nobody reads the stage refilled
                      // next
    start_step(step + kStages - 1);
    const int stage = step % kStages * Shape::kStageElements;
    multiply_stage<T>(d, a_tiles + stage + warp_row * Shape::kStride,
                      b_tiles + stage + warp_column * Shape::kStride);
  }
  store_tile(c, d, row + warp_row, column + warp_column, m, n);
}

// c = a^T b with a [16, 16] and b [16, 8] as they lie in memory: both operands need the transposing
// ldmatrix.
__global__ void transposed_matmul_kernel(const float16* a, const float16* b, float* c) {
  VTOK_SHARED(float16, a_tile, 16 * 16);
  VTOK_SHARED(float16, b_tile, 16 * 8);
  const int lane = threadIdx.x;
  cp_async<16>(a_tile + lane * 8, a + lane * 8, true);
  cp_async<8>(b_tile + lane * 4, b + lane * 4, true);
  cp_async_wait_all();
  __syncwarp();
  uint32_t a_registers[4], b_registers[2];
  float d[4] = {};
  // Matrix i holds rows 8 (i / 2) and columns 8 (i % 2) of a, that is, columns and rows of a^T.
  ldmatrix_x4_trans(a_registers, a_tile + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  ldmatrix_x2_trans(b_registers, b_tile + lane % 16 * 8);
  mma_m16n8k16<float16>(d, a_registers, b_registers);
  for (int part = 0; part < 4; ++part)
    c[(lane / 4 + part / 2 * 8) * 8 + lane % 4 * 2 + part % 2] = d[part];
}

__global__ void small_matmul_kernel(const bfloat16* a, const bfloat16* b, float* c) {
  VTOK_SHARED(bfloat16, a_tile, 16 * 8);
  VTOK_SHARED(bfloat16, b_tile, 8 * 8);
  const int lane = threadIdx.x;
  cp_async<8>(a_tile + lane * 4, a + lane * 4, true);
  cp_async<4>(b_tile + lane * 2, b + lane * 2, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t a_registers[2], b_registers[1], b_again[1];
  float d[4] = {};
  ldmatrix_x2(a_registers, a_tile + lane % 16 * 8);
  ldmatrix_x1_trans(b_registers, b_tile + lane % 8 * 8);
  ldmatrix_x1(b_again, b_tile + lane % 8 * 8);
  mma_m16n8k8<bfloat16>(d, a_registers, b_registers);  // + a b
  mma_m16n8k8<bfloat16>(d, a_registers, b_again);      // + a b^T
  for (int part = 0; part < 4; ++part)
    c[(lane / 4 + part / 2 * 8) * 8 + lane % 4 * 2 + part % 2] = d[part];
}

__global__ void clear_kernel(int* counts, int num_bins) {
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) counts[bin] = 0;
}

__global__ void histogram_kernel(const int* __restrict__ values, int* counts, int num_values,
                                 int num_bins) {
  VTOK_DYNAMIC_SHARED(int, local);  // [num_bins]
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) local[bin] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_values; i += gridDim.x * blockDim.x) {
    atomicAdd(&local[values[i]], 1);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x)
    atomic_add(&counts[bin], local[bin]);
}

// Keeps the values that are not negative, in order, within each block of 256.
__global__ void __launch_bounds__(256)
    compact_kernel(const int* __restrict__ values, int* __restrict__ kept,
                   int* __restrict__ num_kept, int num_values) {
  VTOK_SHARED(int, warp_counts, 8);
  const int i = blockIdx.x * 256 + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int value = i < num_values ? values[i] : -1;
  const unsigned ballot = __ballot_sync(kFullWarp, value >= 0);
  if (lane == 0) warp_counts[warp] = __popc(ballot);
  __syncthreads();
  int position = __popc(ballot & ((1u << lane) - 1u)), total = 0;
  for (int w = 0; w < 8; ++w) {
    if (w < warp) position += warp_counts[w];
    total += warp_counts[w];
  }
  if (value >= 0) kept[blockIdx.x * 256 + position] = value;
  if (static_cast<int>(threadIdx.x) >= total) kept[i] = -1;
  if (threadIdx.x == 0) num_kept[blockIdx.x] = total;
}

__global__ void reverse_kernel(const float* __restrict__ x, float* __restrict__ y, int num_values) {
  VTOK_DYNAMIC_SHARED(float, values);  // [num_values]
  for (int i = threadIdx.x * 4; i < num_values; i += blockDim.x * 4) {
    store_vector(values + i, load_vector<Vector<float, 4>>(x + i));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_values; i += blockDim.x) y[i] = values[num_values - 1 - i];
}

__global__ void early_exit_kernel(const float* x, float* y) {
  const int lane = threadIdx.x;
  if (lane >= 20) return;
  const unsigned mask = (1u << 20) - 1u;
  float sum = x[lane];
  for (int offset = 1; offset < 20; offset *= 2) {
    const float below = __shfl_up_sync(mask, sum, offset);
    if (lane >= offset) sum += below;
  }
  y[lane] = sum;
}

// The halves of the warp go different ways, each with collectives of its own, and meet again.
__global__ void half_warps_kernel(const int* x, int* y) {
  const int lane = threadIdx.x;
  int value = x[lane];
  if (lane < 16) {
    value = __shfl_down_sync(0x0000ffffu, value, 1, 16);
    value += __all_sync(0x0000ffffu, value > 0);
  } else {
    value = __shfl_sync(0xffff0000u, value, 3, 16);
    value += __any_sync(0xffff0000u, value > 1000);
    __syncwarp(0xffff0000u);
  }
  y[lane] = value + __reduce_max_sync(kFullWarp, lane);
}

__global__ void barrier_votes_kernel(const int* x, int* y) {
  const int any = __syncthreads_or(x[threadIdx.x] == 7);
  const int all = __syncthreads_and(x[threadIdx.x] >= 0);
  const int count = __syncthreads_count(x[threadIdx.x] % 2 == 0);
  if (threadIdx.x == blockDim.x - 1) {
    y[0] = any != 0;
    y[1] = all != 0;
    y[2] = count;
  }
}

__global__ void copy_vectors_kernel(const float* __restrict__ x, float* __restrict__ y,
                                    int num_vectors) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_vectors) store_vector(y + 4 * i, load_vector<Vector<float, 4>>(x + 4 * i));
}

__global__ void add_to_kernel(const float* __restrict__ x, float* sum, int num_values) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float total = warp_sum(i < num_values ? x[i] : 0.0f);
  if (threadIdx.x % 32 == 0) atomic_add(sum, total);
}

__global__ void copy_elements_kernel(const float* __restrict__ x, float* __restrict__ y,
                                     int columns, int64_t x_stride, int64_t y_stride) {
  const int row = blockIdx.x;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    y[row * y_stride + column] = x[row * x_stride + column];
  }
}

__global__ void fill_bytes_kernel(unsigned char* y, int num_values, unsigned char value) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_values) y[i] = value;
}

__global__ void many_threads_kernel(float* y) {
  y[threadIdx.x] = static_cast<float>(threadIdx.x);
}

int blocks_for(int num_items, int block_size) {
  return (num_items + block_size - 1) / block_size;
}

template <typename T>
void matmul(const T* a, const T* b, float* c, int m, int n, int k) {
  const dim3 grid(blocks_for(n, kTile), blocks_for(m, kTile));
  VTOK_LAUNCH(matmul_kernel<T>, grid, kThreads, 0, nullptr, a, b, c, m, n, k);
}

}  // namespace

void block_sum(const float* x, float* sums, int num_blocks, int block_size) {
  VTOK_LAUNCH(block_sum_kernel, num_blocks, block_size, 0, nullptr, x, sums);
}

void matmul_f16(const float16* a, const float16* b, float* c, int m, int n, int k) {
  matmul(a, b, c, m, n, k);
}
void matmul_bf16(const bfloat16* a, const bfloat16* b, float* c, int m, int n, int k) {
  matmul(a, b, c, m, n, k);
}
void matmul_tf32(const float* a, const float* b, float* c, int m, int n, int k) {
  matmul(a, b, c, m, n, k);
}

void transposed_matmul(const float16* a, const float16* b, float* c) {
  VTOK_LAUNCH(transposed_matmul_kernel, 1, 32, 0, nullptr, a, b, c);
}

void small_matmul(const bfloat16* a, const bfloat16* b, float* c) {
  VTOK_LAUNCH(small_matmul_kernel, 1, 32, 0, nullptr, a, b, c);
}

void histogram(const int* values, int* counts, int num_values, int num_bins) {
  VTOK_LAUNCH(clear_kernel, 1, 64, 0, nullptr, counts, num_bins);
  const size_t bytes = static_cast<size_t>(num_bins) * sizeof(int);
  VTOK_LAUNCH(histogram_kernel, num_multiprocessors(0), 128, bytes, nullptr, values, counts,
              num_values, num_bins);
}

void compact(const int* values, int* kept, int* num_kept, int num_values) {
  VTOK_LAUNCH(compact_kernel, blocks_for(num_values, 256), 256, 0, nullptr, values, kept, num_kept,
              num_values);
}

void reverse_in_large_shared(const float* x, float* y, int num_values) {
  const size_t bytes = static_cast<size_t>(num_values) * sizeof(float);
  VTOK_LAUNCH(reverse_kernel, 1, 256, bytes, nullptr, x, y, num_values);
}

void reverse_in_sm90_shared(const float* x, float* y, int num_values) {
  const size_t bytes = static_cast<size_t>(num_values) * sizeof(float);
  VTOK_LAUNCH_SM90(reverse_kernel, 1, 256, bytes, nullptr, x, y, num_values);
}

void early_exit(const float* x, float* y) {
  VTOK_LAUNCH(early_exit_kernel, 1, 32, 0, nullptr, x, y);
}
void half_warps(const int* x, int* y) {
  VTOK_LAUNCH(half_warps_kernel, 1, 32, 0, nullptr, x, y);
}

void barrier_votes(const int* x, int* y, int num_threads) {
  VTOK_LAUNCH(barrier_votes_kernel, 1, num_threads, 0, nullptr, x, y);
}

void copy_vectors(const float* x, float* y, int num_values) {
  VTOK_LAUNCH(copy_vectors_kernel, blocks_for(num_values / 4, 128), 128, 0, nullptr, x, y,
              num_values / 4);
}

void add_to(const float* x, float* sum, int num_values) {
  VTOK_LAUNCH(add_to_kernel, blocks_for(num_values, 128), 128, 0, nullptr, x, sum, num_values);
}

void copy_elements(const float* x, float* y, int rows, int columns, int64_t x_stride,
                   int64_t y_stride) {
  VTOK_LAUNCH(copy_elements_kernel, rows, 32, 0, nullptr, x, y, columns, x_stride, y_stride);
}

void fill_bytes(unsigned char* y, int num_values, unsigned char value) {
  if (num_values == 0) return;
  VTOK_LAUNCH(fill_bytes_kernel, blocks_for(num_values, 128), 128, 0, nullptr, y, num_values,
              value);
}

void many_threads(float* y, int num_blocks) {
  VTOK_LAUNCH(many_threads_kernel, num_blocks, 256, 0, nullptr, y);
}

}  // namespace vtok::emulation_tests
