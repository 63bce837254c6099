// Approximate elementary functions for results that need not have the same bits everywhere: on a
// GPU one instruction of the special function unit each, elsewhere the accurate function. __expf
// and __fdividef cost four instructions more apiece, for subnormal numbers that no caller sees.
#pragma once

#include <cmath>

#include "host_device.h"

namespace vtok {

// 2^x, relative error < 2^-22 on a GPU; subnormal results are 0.
VTOK_FUNCTION float exp2_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// 1 / x, error 1 ulp on a GPU; 0 where |x| > 2^126, infinity for subnormal x.
VTOK_FUNCTION float reciprocal_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

}  // namespace vtok
