// The functions of core/wgmma.cuh, which documents them, on the host: index maths of operands and
// results. A product is done when it is issued; what the real one needs of fences and waits is for
// a GPU run.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/half.h"
#include "kernel_language.h"

namespace vtok {

inline void fence_async_proxy() {}
inline void warpgroup_fence() {}
inline void warpgroup_commit() {}
template <int N>
inline void warpgroup_wait() {}

namespace emulation {

// Sixteen elements of a row along k, found as the hardware does: by the bits of the address.
template <typename T>
void read_wgmma_row(float (&values)[16], const char* rows, int row, int step) {
  for (int half = 0; half < 2; ++half) {
    const uintptr_t plain = static_cast<uintptr_t>(row) * 128 + step * 32 + half * 16;
    T elements[8];
    std::memcpy(elements, rows + (plain ^ (plain >> 7 & 7) << 4), sizeof elements);
    for (int e = 0; e < 8; ++e) values[half * 8 + e] = to_float(elements[e]);
  }
}

}  // namespace emulation

template <typename T, int N>
inline void warpgroup_multiply(float (&d)[N / 8][4], const void* a_rows, const void* b_rows,
                               int step) {
  emulation::check_alignment(a_rows, 1024, "wgmma operand a");
  emulation::check_alignment(b_rows, 1024, "wgmma operand b");
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  float a[2][16];
  for (int i = 0; i < 2; ++i) {
    emulation::read_wgmma_row<T>(a[i], static_cast<const char*>(a_rows), row + 8 * i, step);
  }
  for (int j = 0; j < N / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      float b[16];
      const int column = 8 * j + lane % 4 * 2 + e;
      emulation::read_wgmma_row<T>(b, static_cast<const char*>(b_rows), column, step);
      for (int i = 0; i < 2; ++i) {
        float sum = d[j][2 * i + e];
        for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k];
        d[j][2 * i + e] = sum;
      }
    }
  }
}

}  // namespace vtok
