// The functions of core/mma.cuh, which documents them, on the host. The extra parameters carry the
// source position.
#pragma once

#include <type_traits>

#include "../core/half.h"
#include "async_copy.h"
#include "tensor_core.h"

#define VTOK_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace vtok {

template <int Bytes>
inline void cp_async(void* shared_destination, const void* global_source, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulation::async_copy(shared_destination, global_source, Bytes, valid);
}

inline void cp_async_commit() {
  emulation::async_copy_commit();
}

template <int N>
inline void cp_async_wait() {
  static_assert(N >= 0, "the number of groups in flight is not negative");
  emulation::async_copy_wait(N);
}

inline void cp_async_wait_all() {
  emulation::async_copy_wait_all();
}

inline void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row, VTOK_EMULATION_SITE) {
  emulation::load_matrix(r, 1, false, shared_row, {"ldmatrix_x1", file, line});
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, VTOK_EMULATION_SITE) {
  emulation::load_matrix(r, 2, false, shared_row, {"ldmatrix_x2", file, line});
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, VTOK_EMULATION_SITE) {
  emulation::load_matrix(r, 4, false, shared_row, {"ldmatrix_x4", file, line});
}

inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* shared_row, VTOK_EMULATION_SITE) {
  emulation::load_matrix(r, 1, true, shared_row, {"ldmatrix_x1_trans", file, line});
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row, VTOK_EMULATION_SITE) {
  emulation::load_matrix(r, 2, true, shared_row, {"ldmatrix_x2_trans", file, line});
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, VTOK_EMULATION_SITE) {
  emulation::load_matrix(r, 4, true, shared_row, {"ldmatrix_x4_trans", file, line});
}

namespace emulation {

template <typename T>
constexpr OperandType operand_type() {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>,
                "mma operands are float16 or bfloat16");
  return std::is_same_v<T, float16> ? OperandType::kFloat16 : OperandType::kBFloat16;
}

}  // namespace emulation

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         VTOK_EMULATION_SITE) {
  emulation::multiply_accumulate(d, a, b, 16, emulation::operand_type<T>(),
                                 {"mma_m16n8k16", file, line});
}

template <typename T>
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                        VTOK_EMULATION_SITE) {
  emulation::multiply_accumulate(d, a, b, 8, emulation::operand_type<T>(),
                                 {"mma_m16n8k8", file, line});
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             VTOK_EMULATION_SITE) {
  emulation::multiply_accumulate(d, a, b, 8, emulation::OperandType::kTf32,
                                 {"mma_m16n8k8_tf32", file, line});
}

inline uint32_t float_to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  return is_finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

}  // namespace vtok

#undef VTOK_EMULATION_SITE
