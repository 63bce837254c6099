// Arithmetic intrinsics of CUDA C++. The approximate ones (__expf, __fdividef, ...) are computed
// accurately here: an error bound that depends on the approximation has to be tested on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vtok::emulation {

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// NaN becomes 0 and values out of range are clamped, as the cvt instruction does; a C++ cast would
// be undefined.
template <typename Integer, typename Real>
inline Integer saturating_convert(Real value) {
  constexpr Integer kLowest = Integer(1) << (sizeof(Integer) * 8 - 1);  // two's complement minimum
  if (std::isnan(value)) return 0;
  if (value <= static_cast<Real>(kLowest)) return kLowest;
  if (value >= -static_cast<Real>(kLowest)) return Integer(~kLowest);
  return static_cast<Integer>(value);
}

}  // namespace vtok::emulation

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}

inline int min(int a, int b) {
  return b < a ? b : a;
}
inline int max(int a, int b) {
  return a < b ? b : a;
}
inline unsigned min(unsigned a, unsigned b) {
  return b < a ? b : a;
}
inline unsigned max(unsigned a, unsigned b) {
  return a < b ? b : a;
}
inline long min(long a, long b) {
  return b < a ? b : a;
}
inline long max(long a, long b) {
  return a < b ? b : a;
}
inline long long min(long long a, long long b) {
  return b < a ? b : a;
}
inline long long max(long long a, long long b) {
  return a < b ? b : a;
}
inline unsigned long min(unsigned long a, unsigned long b) {
  return b < a ? b : a;
}
inline unsigned long max(unsigned long a, unsigned long b) {
  return a < b ? b : a;
}
inline unsigned long long min(unsigned long long a, unsigned long long b) {
  return b < a ? b : a;
}
inline unsigned long long max(unsigned long long a, unsigned long long b) {
  return a < b ? b : a;
}
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}

inline float rsqrtf(float value) {
  return 1.0f / std::sqrt(value);
}
inline double rsqrt(double value) {
  return 1.0 / std::sqrt(value);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __frcp_rn(float value) {
  return 1.0f / value;
}
inline float __fsqrt_rn(float value) {
  return std::sqrt(value);
}
inline float __frsqrt_rn(float value) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value)));
}
inline double __fma_rn(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline float __expf(float value) {
  return std::exp(value);
}
inline float __logf(float value) {
  return std::log(value);
}
inline float __log2f(float value) {
  return std::log2(value);
}
inline float __sinf(float value) {
  return std::sin(value);
}
inline float __cosf(float value) {
  return std::cos(value);
}
inline float __powf(float base, float exponent) {
  return std::pow(base, exponent);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __saturatef(float value) {
  return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
}  // NaN -> 0

inline int __float2int_rn(float value) {
  return vtok::emulation::saturating_convert<int>(std::nearbyint(value));
}
inline int __float2int_rz(float value) {
  return vtok::emulation::saturating_convert<int>(std::trunc(value));
}
inline int __float2int_rd(float value) {
  return vtok::emulation::saturating_convert<int>(std::floor(value));
}
inline int __float2int_ru(float value) {
  return vtok::emulation::saturating_convert<int>(std::ceil(value));
}
inline long long __float2ll_rd(float value) {
  return vtok::emulation::saturating_convert<long long>(std::floor(value));
}
inline float __int2float_rn(int value) {
  return static_cast<float>(value);
}
inline float __uint2float_rn(unsigned value) {
  return static_cast<float>(value);
}

inline unsigned __float_as_uint(float value) {
  return vtok::emulation::bit_cast<unsigned>(value);
}
inline int __float_as_int(float value) {
  return vtok::emulation::bit_cast<int>(value);
}
inline float __uint_as_float(unsigned bits) {
  return vtok::emulation::bit_cast<float>(bits);
}
inline float __int_as_float(int bits) {
  return vtok::emulation::bit_cast<float>(bits);
}
inline long long __double_as_longlong(double value) {
  return vtok::emulation::bit_cast<long long>(value);
}
inline double __longlong_as_double(long long bits) {
  return vtok::emulation::bit_cast<double>(bits);
}

inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __popcll(unsigned long long value) {
  return __builtin_popcountll(value);
}
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __ffsll(long long value) {
  return __builtin_ffsll(value);
}
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= ((value >> bit) & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<unsigned long long>((static_cast<Wide>(a) * b) >> 64);
}
