// A torch tensor as kernels see it: pointer, shape, strides, dtype, device. Owns nothing.
//
// Note [Three roles of a tensor argument]
// A binding says with the type of each argument what the op does with it:
//   TensorView     read only: no op writes into a caller's tensor;
//   OutputView     freshly allocated by Python, every element is written;
//   WorkspaceView  scratch memory, contents undefined before and after.
// The difference costs nothing at run time; the CUDA emulation (csrc/emulation) checks it.
#pragma once

#include <cstdint>
#include <string>

#include "check.h"
#include "half.h"

namespace vtok {

constexpr int kMaxDims = 8;

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8, kInt32, kInt64, kBool };
enum class DeviceType { kCPU, kCUDA };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kUInt8: return "uint8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kBool: return "bool";
  }
  return "unknown";
}

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kUInt8:
    case DType::kBool: return 1;
  }
  return 0;
}

template <typename T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::kFloat64;
};
template <>
struct dtype_of<float16> {
  static constexpr DType value = DType::kFloat16;
};
template <>
struct dtype_of<bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct dtype_of<int32_t> {
  static constexpr DType value = DType::kInt32;
};
template <>
struct dtype_of<int64_t> {
  static constexpr DType value = DType::kInt64;
};

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  DeviceType device = DeviceType::kCPU;
  int device_index = 0;
  int num_dims = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  int64_t num_elements() const {
    int64_t count = 1;
    for (int dim = 0; dim < num_dims; ++dim) count *= shape[dim];
    return count;
  }

  template <typename T>
  const T* data_as() const {
    VTOK_CHECK_TYPE(dtype == dtype_of<T>::value, "tensor must be ", name_of(dtype_of<T>::value),
                    ", got ", name_of(dtype));
    return static_cast<const T*>(data);
  }
};

struct OutputView : TensorView {
  template <typename T>
  T* data_as() const {
    return const_cast<T*>(TensorView::data_as<T>());
  }
};

struct WorkspaceView : OutputView {};

// Throws unless every tensor that is present lies on the device of the first.
template <typename... Views>
void check_same_device(const char* op, const TensorView& first, const Views&... others) {
  const auto check = [&](const TensorView& other) {
    VTOK_CHECK_VALUE(other.data == nullptr ||
                         (other.device == first.device && other.device_index == first.device_index),
                     op, ": tensors must be on one device, got several");
  };
  (check(others), ...);
}

inline std::string shape_string(const TensorView& view) {
  std::string text = "[";
  for (int dim = 0; dim < view.num_dims; ++dim) {
    text += (dim ? ", " : "") + std::to_string(view.shape[dim]);
  }
  return text + "]";
}

}  // namespace vtok
