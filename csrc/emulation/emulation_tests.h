// Host functions of the test kernels. Pointers are device pointers; a null stream is the default
// stream.
#pragma once

#include <cstdint>
#include <string>

#include "../core/half.h"

namespace vtok::emulation_tests {

// Correct kernels (right_kernels.cu).
void block_sum(const float* x, float* sums, int num_blocks,
               int block_size);  // x [blocks, size], sums [blocks]
void matmul_f16(const float16* a, const float16* b, float* c, int m, int n,
                int k);  // a [m, k], b [n, k], c [m, n]
void matmul_bf16(const bfloat16* a, const bfloat16* b, float* c, int m, int n, int k);
void matmul_tf32(const float* a, const float* b, float* c, int m, int n, int k);
void transposed_matmul(const float16* a, const float16* b,
                       float* c);  // a [16, 16] = A^T, b [16, 8], c [16, 8]
void small_matmul(const bfloat16* a, const bfloat16* b,
                  float* c);  // a [16, 8], b [8, 8], c [16, 8]
void histogram(const int* values, int* counts, int num_values, int num_bins);
void compact(const int* values, int* kept, int* num_kept,
             int num_values);  // per block of 256; kept is padded by -1
void reverse_in_large_shared(const float* x, float* y, int num_values);  // num_values multiple of 4
void reverse_in_sm90_shared(const float* x, float* y, int num_values);
void early_exit(const float* x, float* y);                    // 20 lanes of one warp
void half_warps(const int* x, int* y);                        // 32 values
void barrier_votes(const int* x, int* y, int num_threads);    // y [3]: or, and, count
void copy_vectors(const float* x, float* y, int num_values);  // num_values multiple of 4
void add_to(const float* x, float* sum, int num_values);      // sum [1] += sum of x, float atomics
void copy_elements(const float* x, float* y, int rows, int columns, int64_t x_stride,
                   int64_t y_stride);
void fill_bytes(unsigned char* y, int num_values, unsigned char value);

// Kernels that are wrong on purpose (wrong_kernels.cu): x [n] input, y [n] output, n = 256. `name`
// names the fault.
void run_wrong_kernel(const std::string& name, const float* x, float* y, int n);

// Many launches of cheap threads, for the speed figures.
void many_threads(float* y, int num_blocks);  // y [256]: no barriers, 256 threads per block

}  // namespace vtok::emulation_tests
