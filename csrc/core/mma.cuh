// Asynchronous copies and tensor core instructions of sm_80: cp.async, ldmatrix, mma.sync.
//
// Note [Register layouts of mma.sync]
// group = lane / 4, member = lane % 4. A register holds two 16-bit elements, the lower index in the
// low half, or one tf32 element.
//   m16n8k16   a[0]  row group,      columns 2 member, 2 member + 1
//              a[1]  row group + 8,  the same columns
//              a[2]  row group,      columns 2 member + 8, 2 member + 9
//              a[3]  row group + 8,  the same columns as a[2]
//              b[0]  column group,   rows 2 member, 2 member + 1
//              b[1]  column group,   rows 2 member + 8, 2 member + 9
//   m16n8k8    a[0], a[1] and b[0] as above
//   k8, tf32   a[0], a[1]  rows group, group + 8,  column member
//              a[2], a[3]  rows group, group + 8,  column member + 4
//              b[0], b[1]  column group,           rows member, member + 4
//   d          d[0], d[1]  row group,      columns 2 member, 2 member + 1
//              d[2], d[3]  row group + 8,  the same columns
// Each a or b register of 16-bit elements is one 8 x 8 matrix as ldmatrix loads it: for a from
// row-major [M, K]; for b without transposition from [N, K], with transposition from [K, N].
// Source: PTX ISA, sections on mma.m16n8k16, mma.m16n8k8, ldmatrix and cp.async.
#pragma once

#include <type_traits>

#include "half.h"
#include "launch.cuh"

#ifdef VTOK_EMULATE_CUDA
#include "../emulation/emulated_mma.h"  // the same functions on the host
#else

namespace vtok {
namespace detail {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace detail

// Starts a copy of Bytes (4, 8 or 16, the alignment of both sides) to shared memory. With `valid`
// false it writes zeros and does not touch the source.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared_destination, const void* global_source,
                                         bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t destination = detail::shared_address(shared_destination);
  const int source_bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    // .cg goes past L1, which a tile that is read once would only pollute. It exists for 16 bytes
    // alone.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination),
                 "l"(global_source), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(destination),
                 "l"(global_source), "n"(Bytes), "r"(source_bytes)
                 : "memory");
  }
}

// Closes the group of all copies that this thread has started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most N of this thread's latest groups are in flight. Other threads see the data
// after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Waits for all copies of this thread, committed or not.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

// ldmatrix_x1, _x2, _x4 load that many 8 x 8 matrices of 16-bit elements; all 32 lanes take part.
// Lane 8 m + r gives the address of row r of matrix m, a multiple of 16. Matrix m lands in r[m],
// transposed with _trans.
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
               : "=r"(r[0])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
               : "=r"(r[0])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

// d (16 x 8, float32) += a (16 x 16) * b (16 x 8) for T = float16 or bfloat16; all 32 lanes take
// part.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>,
                "mma operands are float16 or bfloat16");
  if constexpr (std::is_same_v<T, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d (16 x 8, float32) += a (16 x 8) * b (8 x 8) for T = float16 or bfloat16; all 32 lanes take
// part.
template <typename T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2],
                                            const uint32_t (&b)[1]) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>,
                "mma operands are float16 or bfloat16");
  if constexpr (std::is_same_v<T, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, "
        "%1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, "
        "%1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
}

// d (16 x 8, float32) += a (16 x 8) * b (8 x 8) in tf32; operands from float_to_tf32. All 32 lanes
// take part.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to tf32 (10 mantissa bits, ties away from zero); mma would truncate, which is biased.
__device__ __forceinline__ uint32_t float_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace vtok

#endif  // VTOK_EMULATE_CUDA
