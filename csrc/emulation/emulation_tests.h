// Host functions of the test kernels. Pointers are device pointers; a null stream is the default
// stream.
#pragma once

#include <cstdint>
#include <string>

#include "../core/half.h"

namespace vtok::emulation_tests {

// Correct kernels (right_kernels.cu).

// x [blocks, size] -> sums [blocks]
void block_sum(const float* x, float* sums, int num_blocks, int block_size);
// a [m, k], b [n, k] -> c [m, n] = a b^T; k is a multiple of 8 (tf32: 4)
void matmul_f16(const float16* a, const float16* b, float* c, int m, int n, int k);
void matmul_bf16(const bfloat16* a, const bfloat16* b, float* c, int m, int n, int k);
void matmul_tf32(const float* a, const float* b, float* c, int m, int n, int k);
// a [16, 16], b [16, 8] -> c [16, 8] = a^T b
void transposed_matmul(const float16* a, const float16* b, float* c);
// a [16, 8], b [8, 8] -> c [16, 8] = a b + a b^T
void small_matmul(const bfloat16* a, const bfloat16* b, float* c);
// values [n] in 0..bins - 1 -> counts [bins]
void histogram(const int* values, int* counts, int num_values, int num_bins);
// Values that are not negative, per 256 of them: kept [blocks, 256] padded by -1, num_kept [blocks]
void compact(const int* values, int* kept, int* num_kept, int num_values);
// x [n] -> y [n] backwards through 4 n bytes of dynamic shared memory; n is a multiple of 4
void reverse_in_large_shared(const float* x, float* y, int num_values);
void reverse_in_sm90_shared(const float* x, float* y, int num_values);
// x [20] -> y [20], the running sum, by 20 lanes of a warp
void early_exit(const float* x, float* y);
// x [32] -> y [32]; halves of a warp in different branches
void half_warps(const int* x, int* y);
// x [threads] -> y [3]: any is 7, all are >= 0, number of even ones
void barrier_votes(const int* x, int* y, int num_threads);
// x [n] -> y [n]; n is a multiple of 4
void copy_vectors(const float* x, float* y, int num_values);
// sum [1] += sum of x [n], with float atomics
void add_to(const float* x, float* sum, int num_values);
// x [rows, columns] -> y [rows, columns], row strides in elements
void copy_elements(const float* x, float* y, int rows, int columns, int64_t x_stride,
                   int64_t y_stride);
void fill_bytes(unsigned char* y, int num_values, unsigned char value);
// y [256]: 256 cheap threads per block, without barriers, for the speed figure
void many_threads(float* y, int num_blocks);

// Kernels that are wrong on purpose (wrong_kernels.cu): x [n] input, y [n] output, n = 256. `name`
// names the fault.
void run_wrong_kernel(const std::string& name, const float* x, float* y, int n);

}  // namespace vtok::emulation_tests
