// The functions of core/wgmma.cuh, which documents them, on the host: operands, results and what is
// still running. That a fence is missing does not show.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/half.h"
#include "kernel_language.h"
#include "warpgroup.h"

namespace vtok {

inline void fence_async_proxy() {}
inline void warpgroup_fence() {}
template <int N>
inline void warpgroup_keep(float (&)[N][4]) {}
inline void warpgroup_commit() {
  emulation::warpgroup_commit_products();
}
template <int N>
inline void warpgroup_wait() {
  emulation::warpgroup_wait_products(N);
}

namespace emulation {

// An element as the hardware finds it: by the bits of its address, from `tile` on.
template <typename T>
float read_wgmma(const void* tile, uintptr_t plain) {
  T element;
  std::memcpy(&element, static_cast<const char*>(tile) + (plain ^ (plain >> 7 & 7) << 4),
              sizeof element);
  return to_float(element);
}

// Sixteen elements along k of row `row` of an operand.
template <typename T, bool kTransposed>
void read_wgmma_row(float (&values)[16], const void* tile, int row, int step) {
  for (int e = 0; e < 16; ++e) {
    const int k = step * 16 + e;
    const uintptr_t plain =
        kTransposed ? row / 64 * 8192 + k * 128 + row % 64 * 2 : row * 128 + k * 2;
    values[e] = read_wgmma<T>(tile, plain);
  }
}

template <typename T, int N, bool kTransposed>
void multiply_warpgroup(float* sums, const void* a_rows, const void* b_rows, int step,
                        unsigned thread) {
  const int lane = thread % 32;
  const int row = thread % 128 / 32 * 16 + lane / 4;
  float a[2][16];
  for (int i = 0; i < 2; ++i) read_wgmma_row<T, kTransposed>(a[i], a_rows, row + 8 * i, step);
  for (int j = 0; j < N / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      float b[16];
      read_wgmma_row<T, kTransposed>(b, b_rows, 8 * j + lane % 4 * 2 + e, step);
      for (int i = 0; i < 2; ++i) {
        float& sum = sums[4 * j + 2 * i + e];
        for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k];
      }
    }
  }
}

}  // namespace emulation

template <typename T, int N>
inline void warpgroup_multiply(float (&d)[N / 8][4], const void* a_rows, const void* b_rows,
                               int step) {
  emulation::warpgroup_issue(&d[0][0], N / 2, a_rows, b_rows, step,
                             emulation::multiply_warpgroup<T, N, false>);
}

template <typename T, int N>
inline void warpgroup_multiply_transposed(float (&d)[N / 8][4], const void* a_block,
                                          const void* b_blocks, int step) {
  emulation::warpgroup_issue(&d[0][0], N / 2, a_block, b_blocks, step,
                             emulation::multiply_warpgroup<T, N, true>);
}

}  // namespace vtok
