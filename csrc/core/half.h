// float16 and bfloat16 as storage types, their conversions from and to float, and loads and stores
// that convert.
// All arithmetic in this package is done in float: a half type is only ever loaded, converted and
// stored. The host conversions are branch-free integer code, so that compilers vectorise them on
// every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

#if defined(__CUDACC__) && !defined(VTOK_EMULATE_CUDA)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace vtok {

struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

VTOK_FUNCTION uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VTOK_FUNCTION float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

VTOK_FUNCTION float to_float(float value) {
  return value;
}

VTOK_FUNCTION float to_float(bfloat16 value) {
  return bits_to_float(uint32_t(value.bits) << 16);
}

VTOK_FUNCTION float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Exponent and mantissa are moved into place and the exponent bias (127 - 15 = 112) is added; a
  // subnormal is one step of the exponent above itself, without the leading one it never had, so
  // that no subnormal float32 arises, which a thread may flush. Infinity and NaN keep an all-ones
  // exponent.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t scaled = magnitude < (1u << 23) ? subnormal : normal;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return bits_to_float(sign | scaled | special);
#endif
}

VTOK_FUNCTION bfloat16 float_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return bfloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded =
      (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  return bfloat16{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
#endif
}

VTOK_FUNCTION float16 float_to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return float16{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias by 112 and round the 13 dropped bits to nearest, ties to even.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the rounded subnormal in the low mantissa bits.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65,520 and above rounds to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return float16{uint16_t(sign | result)};
#endif
}

template <typename T>
VTOK_FUNCTION T from_float(float value) {
  if constexpr (std::is_same_v<T, float16>) {
    return float_to_float16(value);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return float_to_bfloat16(value);
  } else {
    return static_cast<T>(value);
  }
}

// The type of the arithmetic on values that are stored as T: float, but double for double.
template <typename T>
using real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
VTOK_FUNCTION real<T> load(const T* address) {
  if constexpr (std::is_same_v<T, double>) {
    return *address;
  } else {
    return to_float(*address);
  }
}

template <typename T>
VTOK_FUNCTION void store(T* address, real<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    *address = value;
  } else {
    *address = from_float<T>(value);
  }
}

}  // namespace vtok
