// Elementary functions that compilers vectorise: no branches, no library calls, no fused
// multiply-add.
//
// Note [The same bits everywhere]
// Every step below is one IEEE operation (+, -, *, /) in a fixed order, compiled with contraction
// off
// (-ffp-contract=off, nvcc -fmad=false for the files that include this). Results are therefore
// bitwise equal on every CPU instruction set and on CUDA: a video tokenized on a GPU and on a
// laptop from equal latents gives equal tokens.
//
// The stated errors are checked against double in python_tests/test_vectorized.py.
#pragma once

#include <cmath>

#include "half.h"

namespace vtok {

// Round to nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
VTOK_FUNCTION float round_even(float x) {
  constexpr float kMagic = 12582912.0f;
  return (x + kMagic) - kMagic;
}

VTOK_FUNCTION double round_even(double x) {
  constexpr double kMagic = 6755399441055744.0;
  return (x + kMagic) - kMagic;
}

namespace detail {

struct ScaledExpm1 {
  float scale;  // 2^n
  float expm1;  // e^r - 1 with |r| <= ln(2) / 2, so that e^x = scale * (1 + expm1)
};

// x in [-87, 88]; NaN propagates through `expm1`.
VTOK_FUNCTION ScaledExpm1 reduce_exponent(float x) {
  constexpr float kMagic = 12582912.0f;
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // 9 significant bits: n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  const float shifted = x * kLog2E + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor coefficients of (e^r - 1 - r) / r^2 up to r^5: the next term is 4e-9 of the result.
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  const float expm1 = r + (r * r) * p;
  // The low bits of `shifted` are n; move them into the exponent field.
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return {scale, expm1};
}

}  // namespace detail

// e^x, relative error < 2 ulp on [-87, 88]; 0 below -87, clamped to e^88 = 1.65e38 above, NaN for
// NaN.
VTOK_FUNCTION float exp_accurate(float x) {
  const float upper = x > 88.0f ? 88.0f : x;
  const float clamped = upper < -87.0f ? -87.0f : upper;
  const detail::ScaledExpm1 e = detail::reduce_exponent(clamped);
  const float value = e.scale + e.scale * e.expm1;
  return x < -87.0f ? 0.0f : value;
}

VTOK_FUNCTION double exp_accurate(double x) {
  return std::exp(x);
}

// ln x, error < 2 ulp or 1e-7 (near 1, where ln x is small), for normal x > 0; other x give no
// meaningful value. With x = 2^n m, m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1):
// ln m = 2 (s + s^3 / 3 + s^5 / 5 + ...), s^2 < 0.0295.
VTOK_FUNCTION float log_accurate(float x) {
  constexpr uint32_t kSqrtHalfBits = 0x3f3504f3u;
  constexpr float kLn2High = 0.693359375f;  // 9 significant bits: n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  const uint32_t bits = float_to_bits(x);
  const int32_t n = static_cast<int32_t>(bits - kSqrtHalfBits) >> 23;
  const float f = bits_to_float(bits - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  const float s = f / (f + 2.0f);
  const float z = s * s;
  // Up to s^9 / 9: the next term is z^5 / 11 = 2e-9 of the result.
  float p = 1.11111111e-1f;
  p = p * z + 1.42857143e-1f;
  p = p * z + 2.00000000e-1f;
  p = p * z + 3.33333333e-1f;
  const float scale = static_cast<float>(n);
  const float correction = (2.0f * s) * (z * p) + scale * kLn2Low;
  return (2.0f * s + correction) + scale * kLn2High;
}

VTOK_FUNCTION double log_accurate(double x) {
  return std::log(x);
}

// tanh(x), error < 3 ulp for every finite x (odd, so exact at 0); +-1 at +-infinity, NaN for NaN.
// With u = e^(-2|x|) - 1: tanh|x| = -u / (u + 2), which has no cancellation.
VTOK_FUNCTION float tanh_accurate(float x) {
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  const float clamped = magnitude > 10.0f ? 10.0f : magnitude;  // tanh(10) = 1 - 4e-9 rounds to 1
  const detail::ScaledExpm1 e = detail::reduce_exponent(-2.0f * clamped);
  const float u = e.scale * e.expm1 + (e.scale - 1.0f);
  const float value = (0.0f - u) / (u + 2.0f);  // 0 - u: +0 for x = 0
  return bits_to_float(float_to_bits(value) | (float_to_bits(x) & 0x80000000u));
}

VTOK_FUNCTION double tanh_accurate(double x) {
  return std::tanh(x);
}

// 1 / (1 + e^-x), relative error < 3 ulp for |x| <= 87; below -88 it stays at e^-88 = 6e-39. NaN
// for NaN.
VTOK_FUNCTION float sigmoid_accurate(float x) {
  return 1.0f / (1.0f + exp_accurate(-x));
}

VTOK_FUNCTION double sigmoid_accurate(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

}  // namespace vtok
