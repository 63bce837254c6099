// Matrix products of a warpgroup, four warps from a multiple of four on, on Hopper (sm_90a): wgmma.
//
// Note [Operand tiles of wgmma]
// Both operands lie in shared memory as rows of 64 elements along k, 128 bytes, from a multiple of
// 1024 bytes on. Vector v (16 bytes) of row r lies at v ^ (r % 8): the swizzle of 128 bytes, which
// the instruction undoes by exclusive or of address bits 4..6 with bits 7..9. A step of 16 along k
// therefore just adds 32 bytes to the address.
//
// Transposed operands lie with k along the rows: blocks of 64 columns, in each a row of 128 bytes
// per k with the same swizzle. A block of 64 k is 8192 bytes, a step of 16 along k 2048.
//
// Thread t of the group holds of d (64 x N) in d[j][e]: row t / 32 * 16 + t % 32 / 4 (+ 8 for e >=
// 2), column 8 j + t % 4 * 2 + e % 2. These are the layouts of mma.sync, four warps below each
// other.
//
// The product runs asynchronously: shared memory that threads have written needs
// fence_async_proxy() and a barrier before it; d must not be touched, nor the operands be
// overwritten, until warpgroup_wait. Source: PTX ISA, asynchronous warpgroup level matrix
// instructions.
#pragma once

#include <type_traits>

#include "half.h"
#include "launch.cuh"

#ifdef VTOK_EMULATE_CUDA
#include "../emulation/emulated_wgmma.h"  // the same functions on the host
#else

namespace vtok {

// Only code for sm_90a itself has the instructions; kernels that use them are launched there alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VTOK_SM90A_ASM(...) asm volatile(__VA_ARGS__)
#else
#define VTOK_SM90A_ASM(...) __trap()
#endif

// Shared memory written by this thread becomes visible to wgmma (after a barrier, that of others).
__device__ __forceinline__ void fence_async_proxy() {
  VTOK_SM90A_ASM("fence.proxy.async.shared::cta;\n" :: : "memory");
}

// Keeps the compiler from moving uses of d across this line: it does not know when a product is
// done. To be called before warpgroup_fence and after warpgroup_wait; without, ptxas finds uses of
// d while products run and lets them run one by one.
template <int N>
__device__ __forceinline__ void warpgroup_keep(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
  }
}

// Orders the registers of d before the next product.
__device__ __forceinline__ void warpgroup_fence() {
  VTOK_SM90A_ASM("wgmma.fence.sync.aligned;\n" :: : "memory");
}

// Closes the group of all products since the last commit.
__device__ __forceinline__ void warpgroup_commit() {
  VTOK_SM90A_ASM("wgmma.commit_group.sync.aligned;\n" :: : "memory");
}

// Waits until at most N of the latest groups are running.
template <int N>
__device__ __forceinline__ void warpgroup_wait() {
  VTOK_SM90A_ASM("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

namespace detail {

// The descriptor of a tile as above: address, distance of eight rows, swizzle of 128 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* rows) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(rows));
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// Of transposed operands: the distance of blocks of 64 columns, too.
__device__ __forceinline__ uint64_t wgmma_transposed_descriptor(const void* block) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(block));
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{8192 >> 4} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// clang-format off
#define VTOK_D1(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define VTOK_D4(d, j) VTOK_D1(d, j), VTOK_D1(d, (j) + 1), VTOK_D1(d, (j) + 2), VTOK_D1(d, (j) + 3)
#define VTOK_D8(d, j) VTOK_D4(d, j), VTOK_D4(d, (j) + 4)
#define VTOK_D16(d, j) VTOK_D8(d, j), VTOK_D8(d, (j) + 8)
// clang-format on

#define VTOK_WGMMA_N64(type, transposed)                                                          \
  VTOK_SM90A_ASM("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                      \
                 " {"                                                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, %32, %33, 1, 1, 1, " transposed ", " transposed                              \
                 ";\n" : VTOK_D8(d, 0) : "l"(a),                                                  \
                 "l"(b))

#define VTOK_WGMMA_N128(type, transposed)                                                  \
  VTOK_SM90A_ASM(                                                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                         \
      " {"                                                                                 \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "             \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "   \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"     \
      "}, %64, %65, 1, 1, 1, " transposed ", " transposed ";\n" : VTOK_D16(d, 0) : "l"(a), \
      "l"(b))

#define VTOK_WGMMA_N256(type, transposed)                                                          \
  VTOK_SM90A_ASM(                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, "                                                                                     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
      "%127"                                                                                       \
      "}, %128, %129, 1, 1, 1, " transposed ", " transposed ";\n" : VTOK_D16(d, 0),                \
      VTOK_D16(d, 16) : "l"(a), "l"(b))

}  // namespace detail

// d (64 x N, float32) += a (64 x 16) * b (N x 16)^T, for rows of k from column 16 step on, T =
// float16 or bfloat16. `a_rows` is row 0 of a's 64 rows.
template <typename T, int N>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[N / 8][4], const void* a_rows,
                                                   const void* b_rows, int step) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>,
                "wgmma operands are float16 or bfloat16");
  static_assert(N == 64 || N == 128 || N == 256, "widths of the tiles");
  const uint64_t a = detail::wgmma_descriptor(a_rows) + step * (32 >> 4);
  const uint64_t b = detail::wgmma_descriptor(b_rows) + step * (32 >> 4);
  constexpr bool kHalf = std::is_same_v<T, float16>;
  if constexpr (N == 64 && kHalf) VTOK_WGMMA_N64("f16", "0");
  if constexpr (N == 64 && !kHalf) VTOK_WGMMA_N64("bf16", "0");
  if constexpr (N == 128 && kHalf) VTOK_WGMMA_N128("f16", "0");
  if constexpr (N == 128 && !kHalf) VTOK_WGMMA_N128("bf16", "0");
  if constexpr (N == 256 && kHalf) VTOK_WGMMA_N256("f16", "0");
  if constexpr (N == 256 && !kHalf) VTOK_WGMMA_N256("bf16", "0");
}

// The same for transposed operands: d += a^T * b, where a_block is the block of a's 64 columns and
// b_blocks the first of b's N / 64.
template <typename T, int N>
__device__ __forceinline__ void warpgroup_multiply_transposed(float (&d)[N / 8][4],
                                                              const void* a_block,
                                                              const void* b_blocks, int step) {
  static_assert(N == 128 || N == 256, "widths of the tiles");
  const uint64_t a = detail::wgmma_transposed_descriptor(a_block) + step * (2048 >> 4);
  const uint64_t b = detail::wgmma_transposed_descriptor(b_blocks) + step * (2048 >> 4);
  constexpr bool kHalf = std::is_same_v<T, float16>;
  if constexpr (N == 128 && kHalf) VTOK_WGMMA_N128("f16", "1");
  if constexpr (N == 128 && !kHalf) VTOK_WGMMA_N128("bf16", "1");
  if constexpr (N == 256 && kHalf) VTOK_WGMMA_N256("f16", "1");
  if constexpr (N == 256 && !kHalf) VTOK_WGMMA_N256("bf16", "1");
}

#undef VTOK_WGMMA_N64
#undef VTOK_WGMMA_N128
#undef VTOK_WGMMA_N256
#undef VTOK_D16
#undef VTOK_D8
#undef VTOK_D4
#undef VTOK_D1

}  // namespace vtok

#endif  // VTOK_EMULATE_CUDA
