// The keywords, built-in variables and types of CUDA C++, and the few runtime calls that this
// package makes, for a host compiler. Deliberately absent, so that a kernel using them does not
// compile here: __activemask, warp intrinsics without a mask, named barriers, textures, dynamic
// parallelism, half arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define VTOK_EMULATION_VECTOR_TYPES(type, name)                           \
  struct alignas(2 * sizeof(type)) name##2 {                              \
    type x, y;                                                            \
  };                                                                      \
  struct name##3 {                                                        \
    type x, y, z;                                                         \
  };                                                                      \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { \
    type x, y, z, w;                                                      \
  };                                                                      \
  inline name##2 make_##name##2(type x, type y) {                         \
    return {x, y};                                                        \
  }                                                                       \
  inline name##3 make_##name##3(type x, type y, type z) {                 \
    return {x, y, z};                                                     \
  }                                                                       \
  inline name##4 make_##name##4(type x, type y, type z, type w) {         \
    return {x, y, z, w};                                                  \
  }
VTOK_EMULATION_VECTOR_TYPES(float, float)
VTOK_EMULATION_VECTOR_TYPES(double, double)
VTOK_EMULATION_VECTOR_TYPES(int, int)
VTOK_EMULATION_VECTOR_TYPES(short, short)
VTOK_EMULATION_VECTOR_TYPES(unsigned short, ushort)
VTOK_EMULATION_VECTOR_TYPES(unsigned char, uchar)
#undef VTOK_EMULATION_VECTOR_TYPES
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
  return {x, y, z};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// Of the thread that runs now; the scheduler sets them at every switch.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

// The runtime calls. Nothing is asynchronous here, and only a launch can fail, which it does by
// throwing.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
// Both throw std::runtime_error for a range that is not inside one writable buffer
// (device_memory.cpp).
cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t stream);
