// How kernels of this package are written and launched, once for nvcc and once for the host
// emulation (csrc/emulation).
//
//   VTOK_SHARED(type, name, count);      a static shared array, 16-byte aligned
//   VTOK_DYNAMIC_SHARED(type, name);     the dynamic shared memory as `type* name`, aligned too
//   VTOK_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...);
//   VTOK_LAUNCH_SM90(...)                for a kernel of sm_90 alone: 227 KiB instead of 99
//
// `kernel` with several template arguments goes into parentheses. The grid must not be empty:
// callers return early for zero elements. A launch that fails throws std::runtime_error("KERNEL:
// cudaErrorName: description").
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "half.h"
#include "shared_memory_limits.h"
#include "stream.h"

#ifdef VTOK_EMULATE_CUDA
#include "../emulation/kernel_language.h"
#else

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#define VTOK_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define VTOK_DYNAMIC_SHARED(type, name)                                       \
  extern __shared__ __align__(16) unsigned char vtok_dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(vtok_dynamic_shared_memory)
// The first two variadic arguments are dynamic_shared_bytes and the stream.
#define VTOK_LAUNCH(kernel, grid, block, ...) \
  ::vtok::launch_kernel(#kernel, kernel, grid, block, __VA_ARGS__)
#define VTOK_LAUNCH_SM90(kernel, grid, block, ...) VTOK_LAUNCH(kernel, grid, block, __VA_ARGS__)

#endif

namespace vtok {

// Throws if a CUDA call failed; `what` names the operation.
inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: otherwise torch would report it for its own next call
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

#ifdef VTOK_EMULATE_CUDA

struct DeviceGuard {
  explicit DeviceGuard(int /*device_index*/) {}
};

// Small and no power of two, so that persistent kernels go through their loop more than once.
inline int num_multiprocessors(int /*device_index*/) {
  return 3;
}

// Tests ask for the kernels that use it by name.
inline bool has_wgmma(int /*device_index*/) {
  return false;
}

#else

// Makes `device_index` the current device of the calling thread while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device_index) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    is_changed_ = device_index != previous_;
    if (is_changed_) check_cuda(cudaSetDevice(device_index), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (is_changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool is_changed_ = false;
};

inline int num_multiprocessors(int device_index) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index),
             "cudaDeviceGetAttribute");
  return count;
}

// Whether the GPU is a Hopper and this build has code for sm_90a itself (core/wgmma.cuh).
inline bool has_wgmma([[maybe_unused]] int device_index) {
#ifdef VTOK_HAVE_SM90A
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index),
             "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// Lets `kernel` use all shared memory of a block on the current device. Set once and never lowered:
// threads that launch it with other sizes do not take each other's memory.
inline void opt_in_to_shared_memory(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > done;
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device}) != 0) return;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(attributes.sharedSizeBytes)),
             name);
  done.insert({kernel, device});
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t dynamic_shared_bytes, Stream stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    throw std::runtime_error(std::string(name) +
                             ": grid must not be empty (return early for zero elements)");
  }
  if (dynamic_shared_bytes > kDynamicWithoutOptIn) {
    opt_in_to_shared_memory(reinterpret_cast<const void*>(kernel), name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

#endif

// N values that are loaded and stored by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

namespace detail {

// The built-in type whose load and store nvcc always makes a single instruction.
template <size_t Bytes>
struct MemoryWord;
template <>
struct MemoryWord<1> {
  using type = unsigned char;
};
template <>
struct MemoryWord<2> {
  using type = unsigned short;
};
template <>
struct MemoryWord<4> {
  using type = unsigned;
};
template <>
struct MemoryWord<8> {
  using type = uint2;
};
template <>
struct MemoryWord<16> {
  using type = uint4;
};

}  // namespace detail

// A VectorType (1, 2, 4, 8 or 16 bytes) that is zeros unless it is loaded, from an address that is
// a multiple of its size. Made for loads under a condition: a compiler joins the words of this, but
// the elements of a Vector one by one.
template <typename VectorType>
struct VectorBits {
  using Word = typename detail::MemoryWord<sizeof(VectorType)>::type;
  Word word = {};

  __device__ __forceinline__ void load(const void* address) {
#ifdef VTOK_EMULATE_CUDA
    emulation::check_alignment(address, sizeof(Word), "load_vector");
#endif
    word = *static_cast<const Word*>(address);
  }

  __device__ __forceinline__ VectorType vector() const {
    VectorType result;
    memcpy(&result, &word, sizeof result);
    return result;
  }
};

// The VectorType at `address`, as above.
template <typename VectorType>
__device__ __forceinline__ VectorType load_vector(const void* address) {
  VectorBits<VectorType> bits;
  bits.load(address);
  return bits.vector();
}

template <typename VectorType>
__device__ __forceinline__ void store_vector(void* address, const VectorType& vector) {
  using Word = typename detail::MemoryWord<sizeof(VectorType)>::type;
#ifdef VTOK_EMULATE_CUDA
  emulation::check_alignment(address, sizeof(Word), "store_vector");
#endif
  Word word;
  memcpy(&word, &vector, sizeof word);
  *static_cast<Word*>(address) = word;
}

// The values of a vector in the arithmetic's type. Two bfloat16 are taken apart as one word, by one
// instruction each, where element by element the upper one costs two.
template <typename T, int N>
__device__ __forceinline__ void vector_to_floats(const Vector<T, N>& vector, float (&values)[N]) {
  if constexpr (std::is_same_v<T, bfloat16> && N % 2 == 0) {
    uint32_t words[N / 2];
    memcpy(words, &vector, sizeof vector);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      values[2 * i] = bits_to_float(words[i] << 16);
      values[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_float(vector.values[i]);
  }
}

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> vector_from_floats(const float (&values)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.values[i] = from_float<T>(values[i]);
  return vector;
}

// Adds to global or shared memory. The order of additions is not defined: with floats the last bits
// are not either.
template <typename T>
__device__ __forceinline__ void atomic_add(T* address, T value) {
  atomicAdd(address, value);
}

}  // namespace vtok
