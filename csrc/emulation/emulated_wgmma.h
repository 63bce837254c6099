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

// Sixteen elements of a row along k, found as the hardware does: by the bits of the address.
template <typename T>
void read_wgmma_row(float (&values)[16], const void* rows, int row, int step) {
  for (int half = 0; half < 2; ++half) {
    const uintptr_t plain = static_cast<uintptr_t>(row) * 128 + step * 32 + half * 16;
    T elements[8];
    std::memcpy(elements, static_cast<const char*>(rows) + (plain ^ (plain >> 7 & 7) << 4),
                sizeof elements);
    for (int e = 0; e < 8; ++e) values[half * 8 + e] = to_float(elements[e]);
  }
}

template <typename T, int N>
void multiply_warpgroup(float* sums, const void* a_rows, const void* b_rows, int step,
                        unsigned thread) {
  const int lane = thread % 32;
  const int row = thread % 128 / 32 * 16 + lane / 4;
  float a[2][16];
  for (int i = 0; i < 2; ++i) read_wgmma_row<T>(a[i], a_rows, row + 8 * i, step);
  for (int j = 0; j < N / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      float b[16];
      read_wgmma_row<T>(b, b_rows, 8 * j + lane % 4 * 2 + e, step);
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
                             emulation::multiply_warpgroup<T, N>);
}

}  // namespace vtok
