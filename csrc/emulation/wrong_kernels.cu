// Kernels that are wrong on purpose, one fault each. Every one of them compiles, and many would
// pass a test on some GPU.
#include <cstdint>

#include "../core/launch.cuh"
#include "../core/mma.cuh"
#include "../core/wgmma.cuh"
#include "emulation_tests.h"

namespace vtok::emulation_tests {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kFullWarp = 0xffffffffu;

// Results that depend on the order of threads.

__global__ void read_before_write(const float* x, float* y, int n) {
  VTOK_SHARED(float, values, kThreads);
  const int i = threadIdx.x;
  values[i] = x[i];
  y[i] = values[(i + 1) % n];  // no barrier: the neighbour may not have written yet
}

__global__ void write_after_read(const float* x, float* y, int n) {
  VTOK_SHARED(float, values, kThreads);
  const int i = threadIdx.x;
  values[i] = x[i];
  __syncthreads();
  const float neighbour = values[(i + 1) % n];
  values[i] = 2.0f * neighbour;  // no barrier: another thread may not have read the old value yet
  __syncthreads();
  y[i] = values[i] + neighbour;
}

__global__ void missing_warp_barrier(const float* x, float* y, int) {
  VTOK_SHARED(float, values, kThreads);
  const int i = threadIdx.x;
  values[i] = x[i];
  y[i] = values[i ^ 1];  // lanes of a warp do not run in step
}

__global__ void racing_stores(const float*, float* y, int) {
  y[threadIdx.x] = 0.0f;
  __syncthreads();
  y[0] = static_cast<float>(threadIdx.x);
}

__global__ void racing_blocks(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x] + blockIdx.x;
}

__global__ void shared_read_without_write(const float*, float* y, int) {
  VTOK_SHARED(float, values, kThreads);
  y[threadIdx.x] = values[threadIdx.x];
}

// Global memory.

__global__ void read_out_of_bounds(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x + 1];
}
__global__ void read_far_out_of_bounds(const float* x, float* y, int n) {
  y[threadIdx.x] = x[threadIdx.x + 100 * n];
}
__global__ void read_before_start(const float* x, float* y, int n) {
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) - 100 * n];
}
__global__ void write_out_of_bounds(const float* x, float* y, int n) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 7) y[n] = 1.0f;
}
__global__ void write_before_start(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) y[-1] = 1.0f;
}
__global__ void output_not_written(const float* x, float* y, int n) {
  if (threadIdx.x + 3 < static_cast<unsigned>(n)) y[threadIdx.x] = x[threadIdx.x];
}
__global__ void write_to_input(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 5) const_cast<float*>(x)[5] = 0.0f;
}
__global__ void null_pointer(const float*, float* y, int n) {
  const float* nothing = n > 0 ? nullptr : y;
  y[threadIdx.x] = *static_cast<const volatile float*>(nothing);
}
__global__ void misaligned_vector_load(const float* x, float* y, int n) {
  const int i = threadIdx.x + 5 < static_cast<unsigned>(n) ? threadIdx.x + 1 : 1;
  y[threadIdx.x] = load_vector<Vector<float, 4>>(x + i).values[0];
}
__global__ void misaligned_vector_store(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) store_vector(y + 1, Vector<float, 2>{{1.0f, 2.0f}});
}

// Shared memory.

__global__ void shared_out_of_bounds(const float* x, float* y, int n) {
  VTOK_SHARED(float, values, kThreads);
  float* end = values + n;
  end[threadIdx.x == 3 ? 0 : -1 - static_cast<int>(threadIdx.x)] = 0.0f;
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void dynamic_shared_out_of_bounds(const float* x, float* y, int) {
  VTOK_DYNAMIC_SHARED(float, values);  // launched with 1,024 bytes
  y[threadIdx.x] = values[threadIdx.x + 1] = x[threadIdx.x];
}
__global__ void too_much_static_shared(const float* x, float* y, int) {
  VTOK_SHARED(float, first, 6 * 1024);
  first[threadIdx.x] = x[threadIdx.x];
#ifdef VTOK_EMULATE_CUDA  // nvcc refuses to compile it
  VTOK_SHARED(float, second, 8 * 1024);
  second[threadIdx.x] = first[threadIdx.x];
#endif
  y[threadIdx.x] = first[threadIdx.x];
}
__global__ void static_and_dynamic_shared(const float* x, float* y, int) {
  VTOK_SHARED(float, values, kThreads);
  values[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = values[threadIdx.x];
}
__global__ void shared_without_opt_in(const float* x, float* y, int) {
  VTOK_SHARED(float, values, 6 * 1024);
  values[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = values[threadIdx.x];
}

// Collectives.

__global__ void divergent_collective(const float* x, float* y, int) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(kFullWarp, value, 1);
  } else {
    value = static_cast<float>(__ballot_sync(kFullWarp, value > 0));
  }
  y[threadIdx.x] = value;
}
__global__ void barrier_in_divergent_code(const float* x, float* y, int) {
  if (threadIdx.x < 40) {
    y[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
  } else {
    y[threadIdx.x] = 2.0f * x[threadIdx.x];
    __syncthreads();
  }
}
__global__ void barrier_against_warp_barrier(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void exited_lane_in_mask(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 32 >= 20) return;
  y[threadIdx.x] = __shfl_down_sync(kFullWarp, x[threadIdx.x], 1);
}
__global__ void lane_exits_while_awaited(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 32 < 20) __syncwarp();
}
__global__ void mask_without_caller(const float* x, float* y, int) {
  y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);
}
__global__ void shuffle_from_outside_mask(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 16);
}

// cp.async and ldmatrix.

__global__ void missing_wait(const float* x, float* y, int) {
  VTOK_SHARED(float, values, kThreads);
  cp_async<4>(values + threadIdx.x, x + threadIdx.x, true);
  cp_async_commit();
  __syncthreads();  // no wait: a barrier says nothing about copies
  y[threadIdx.x] = values[threadIdx.x];
  cp_async_wait<0>();
}
__global__ void wait_for_too_few(const float* x, float* y, int) {
  VTOK_SHARED(float, values, 2 * kThreads);
  for (int stage = 0; stage < 2; ++stage) {
    cp_async<4>(values + stage * kThreads + threadIdx.x, x + threadIdx.x, true);
    cp_async_commit();
  }
  cp_async_wait<1>();  // lets the second group, which is read below, stay in flight
  y[threadIdx.x] = values[threadIdx.x] + values[kThreads + threadIdx.x];
  cp_async_wait<0>();
}
__global__ void overwritten_stage(const float* x, float* y, int n) {
  VTOK_SHARED(float, values, kThreads);
  const int i = threadIdx.x;
  cp_async<4>(values + i, x + i, true);
  cp_async_wait_all();
  __syncthreads();
  const float neighbour = values[(i + 1) % n];
  // No barrier: another thread may still read values[i].
  cp_async<4>(values + i, x + (n - 1 - i), true);
  cp_async_wait_all();
  y[i] = neighbour;
}
__global__ void never_waited_group(const float* x, float* y, int) {
  VTOK_SHARED(float, values, kThreads);
  y[threadIdx.x] = x[threadIdx.x];
  cp_async<4>(values + threadIdx.x, x + threadIdx.x, true);
  cp_async_commit();
}
__global__ void misaligned_cp_async(const float* x, float* y, int) {
  VTOK_SHARED(float, values, kThreads + 8);
  cp_async<16>(values, x + (threadIdx.x == 0 ? 1 : 0), true);
  cp_async_wait_all();
  y[threadIdx.x] = values[0];
}
__global__ void cp_async_outside_shared(const float* x, float* y, int n) {
  VTOK_SHARED(float, values, kThreads);
  cp_async<4>(values + threadIdx.x + n / 2, x + threadIdx.x, true);
  cp_async_wait_all();
  y[threadIdx.x] = values[threadIdx.x];
}
__global__ void misaligned_ldmatrix(const float* x, float* y, int) {
  VTOK_SHARED(float, values, kThreads);
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  uint32_t r[1];
  ldmatrix_x1(r, values + threadIdx.x % 8 * 5);  // rows of 20 bytes
  y[threadIdx.x] = __uint_as_float(r[0]);
}

// wgmma.

constexpr int kTileBytes = 64 * 128;

// Both operands: ones scaled by x, the tile of b behind that of a; returns the first row.
__device__ char* fill_operands(char* memory, float value) {
  char* tile = memory + (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024;
  for (int i = threadIdx.x; i < kTileBytes; i += blockDim.x) {
    store_vector(tile + 2 * i, from_float<bfloat16>(value));
  }
  fence_async_proxy();
  __syncthreads();
  return tile;
}
__device__ void multiply_tile(float (&sums)[8][4], const char* tile) {
  warpgroup_keep(sums);
  warpgroup_fence();
  warpgroup_multiply<bfloat16, 64>(sums, tile, tile + kTileBytes, 0);
  warpgroup_commit();
}
__global__ void sums_used_early(const float* x, float* y, int) {
  VTOK_DYNAMIC_SHARED(char, memory);
  float sums[8][4] = {};
  multiply_tile(sums, fill_operands(memory, x[0]));
  y[threadIdx.x] = sums[0][0];  // no wait
  warpgroup_wait<0>();
}
__global__ void operand_overwritten_early(const float* x, float* y, int) {
  VTOK_DYNAMIC_SHARED(char, memory);
  float sums[8][4] = {};
  char* tile = fill_operands(memory, x[0]);
  multiply_tile(sums, tile);
  __syncthreads();  // no wait: a barrier says nothing about products
  fill_operands(memory, 2.0f * x[0]);
  warpgroup_wait<0>();
  warpgroup_keep(sums);
  y[threadIdx.x] = sums[0][0];
}
__global__ void operand_not_arrived(const float* x, float* y, int) {
  VTOK_DYNAMIC_SHARED(char, memory);
  float sums[8][4] = {};
  char* tile = fill_operands(memory, x[0]);
  cp_async<16>(tile + threadIdx.x % 8 * 16, x, true);
  cp_async_commit();
  __syncthreads();
  multiply_tile(sums, tile);
  warpgroup_wait<0>();
  warpgroup_keep(sums);
  cp_async_wait<0>();
  y[threadIdx.x] = sums[0][0];
}
__global__ void misaligned_operand(const float* x, float* y, int) {
  VTOK_DYNAMIC_SHARED(char, memory);
  float sums[8][4] = {};
  multiply_tile(sums, fill_operands(memory, x[0]) + 128);
  warpgroup_wait<0>();
  y[threadIdx.x] = sums[0][0];
}
__global__ void products_never_waited_for(const float* x, float* y, int) {
  VTOK_DYNAMIC_SHARED(char, memory);
  float sums[8][4] = {};
  multiply_tile(sums, fill_operands(memory, x[0]));
  y[threadIdx.x] = x[threadIdx.x];
}

// Others.

__device__ int depth_of(int n, volatile const float* x) {
  volatile float frame[256];
  frame[0] = x[0];
  return n == 0 ? static_cast<int>(frame[0]) : depth_of(n - 1, frame) + 1;
}
__global__ void stack_overflow(const float* x, float* y, int n) {
  y[threadIdx.x] = static_cast<float>(depth_of(n * 1000, x));
}
__global__ void division_by_zero(const float* x, float* y, int n) {
  y[threadIdx.x] = x[threadIdx.x] + static_cast<float>(n / static_cast<int>(threadIdx.x % 8));
}

struct Case {
  const char* name;
  void (*run)(const float* x, float* y, int n);
};

// A launch of `kernel` under `name` with the given blocks, threads and dynamic bytes.
#define VTOK_CASE(name, kernel, num_blocks, num_threads, dynamic_bytes)             \
  {name, [](const float* x, float* y, int n) {                                      \
     VTOK_LAUNCH(kernel, num_blocks, num_threads, dynamic_bytes, nullptr, x, y, n); \
   }}
const Case kCases[] = {
    VTOK_CASE("read_before_write", read_before_write, 1, kThreads, 0),
    VTOK_CASE("write_after_read", write_after_read, 1, kThreads, 0),
    VTOK_CASE("missing_warp_barrier", missing_warp_barrier, 1, kThreads, 0),
    VTOK_CASE("racing_stores", racing_stores, 1, kThreads, 0),
    VTOK_CASE("racing_blocks", racing_blocks, 3, kThreads, 0),
    VTOK_CASE("shared_read_without_write", shared_read_without_write, 1, kThreads, 0),
    VTOK_CASE("read_out_of_bounds", read_out_of_bounds, 1, kThreads, 0),
    VTOK_CASE("read_far_out_of_bounds", read_far_out_of_bounds, 1, kThreads, 0),
    VTOK_CASE("read_before_start", read_before_start, 1, kThreads, 0),
    VTOK_CASE("write_out_of_bounds", write_out_of_bounds, 1, kThreads, 0),
    VTOK_CASE("write_before_start", write_before_start, 1, kThreads, 0),
    VTOK_CASE("output_not_written", output_not_written, 1, kThreads, 0),
    VTOK_CASE("write_to_input", write_to_input, 1, kThreads, 0),
    VTOK_CASE("null_pointer", null_pointer, 1, kThreads, 0),
    VTOK_CASE("misaligned_vector_load", misaligned_vector_load, 1, kThreads, 0),
    VTOK_CASE("misaligned_vector_store", misaligned_vector_store, 1, kThreads, 0),
    VTOK_CASE("shared_out_of_bounds", shared_out_of_bounds, 1, kThreads, 0),
    VTOK_CASE("dynamic_shared_out_of_bounds", dynamic_shared_out_of_bounds, 1, kThreads,
              kThreads * sizeof(float)),
    VTOK_CASE("too_much_static_shared", too_much_static_shared, 1, kThreads, 0),
    VTOK_CASE("static_and_dynamic_shared", static_and_dynamic_shared, 1, kThreads, 99 * 1024),
    VTOK_CASE("too_much_dynamic_shared", static_and_dynamic_shared, 1, kThreads, 100 * 1024),
    VTOK_CASE("shared_without_opt_in", shared_without_opt_in, 1, kThreads, 30 * 1024),
    VTOK_CASE("divergent_collective", divergent_collective, 1, kThreads, 0),
    VTOK_CASE("barrier_in_divergent_code", barrier_in_divergent_code, 1, kThreads, 0),
    VTOK_CASE("barrier_against_warp_barrier", barrier_against_warp_barrier, 1, kThreads, 0),
    VTOK_CASE("exited_lane_in_mask", exited_lane_in_mask, 1, kThreads, 0),
    VTOK_CASE("lane_exits_while_awaited", lane_exits_while_awaited, 1, kThreads, 0),
    VTOK_CASE("mask_without_caller", mask_without_caller, 1, kThreads, 0),
    VTOK_CASE("shuffle_from_outside_mask", shuffle_from_outside_mask, 1, kThreads, 0),
    VTOK_CASE("missing_wait", missing_wait, 1, kThreads, 0),
    VTOK_CASE("wait_for_too_few", wait_for_too_few, 1, kThreads, 0),
    VTOK_CASE("overwritten_stage", overwritten_stage, 1, kThreads, 0),
    VTOK_CASE("never_waited_group", never_waited_group, 1, kThreads, 0),
    VTOK_CASE("misaligned_cp_async", misaligned_cp_async, 1, kThreads, 0),
    VTOK_CASE("cp_async_outside_shared", cp_async_outside_shared, 1, kThreads, 0),
    VTOK_CASE("misaligned_ldmatrix", misaligned_ldmatrix, 1, kThreads, 0),
    VTOK_CASE("sums_used_early", sums_used_early, 1, kThreads, 3 * kTileBytes),
    VTOK_CASE("operand_overwritten_early", operand_overwritten_early, 1, kThreads, 3 * kTileBytes),
    VTOK_CASE("operand_not_arrived", operand_not_arrived, 1, kThreads, 3 * kTileBytes),
    VTOK_CASE("misaligned_operand", misaligned_operand, 1, kThreads, 3 * kTileBytes),
    VTOK_CASE("products_never_waited_for", products_never_waited_for, 1, kThreads, 3 * kTileBytes),
    VTOK_CASE("stack_overflow", stack_overflow, 1, kThreads, 0),
    VTOK_CASE("division_by_zero", division_by_zero, 1, kThreads, 0),
    VTOK_CASE("empty_grid", racing_blocks, 0, kThreads, 0),
    VTOK_CASE("block_too_large", racing_blocks, 1, 1025, 0),
};
#undef VTOK_CASE

}  // namespace

void run_wrong_kernel(const std::string& name, const float* x, float* y, int n) {
  for (const Case& test : kCases) {
    if (name == test.name) return test.run(x, y, n);
  }
  throw std::invalid_argument("no wrong kernel is called '" + name + "'");
}

}  // namespace vtok::emulation_tests
