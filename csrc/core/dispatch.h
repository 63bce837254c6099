// From run-time values to compile-time types: dtypes here, CPU instruction sets in isa.h.
#pragma once

#include "check.h"
#include "tensor_view.h"

namespace vtok {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls function(TypeTag<T>{}) for the floating type of `dtype`.
template <typename Function>
void dispatch_floating(const char* op, const char* argument, DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32: return function(TypeTag<float>{});
    case DType::kFloat64: return function(TypeTag<double>{});
    case DType::kFloat16: return function(TypeTag<float16>{});
    case DType::kBFloat16: return function(TypeTag<bfloat16>{});
    default:
      VTOK_CHECK_TYPE(false, op, ": ", argument,
                      " must be float32, float64, float16 or bfloat16, got ", name_of(dtype));
  }
}

// As above without float64, which no CUDA kernel of this package supports.
template <typename Function>
void dispatch_floating_cuda(const char* op, const char* argument, DType dtype,
                            Function&& function) {
  switch (dtype) {
    case DType::kFloat32: return function(TypeTag<float>{});
    case DType::kFloat16: return function(TypeTag<float16>{});
    case DType::kBFloat16: return function(TypeTag<bfloat16>{});
    default:
      VTOK_CHECK_TYPE(false, op, ": ", argument,
                      " must be float32, float16 or bfloat16 on CUDA, got ", name_of(dtype));
  }
}

// Calls function(TypeTag<Index>{}) for int32 or int64 indices.
template <typename Function>
void dispatch_index(const char* op, const char* argument, DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kInt32: return function(TypeTag<int32_t>{});
    case DType::kInt64: return function(TypeTag<int64_t>{});
    default:
      VTOK_CHECK_TYPE(false, op, ": ", argument, " must be int32 or int64, got ", name_of(dtype));
  }
}

}  // namespace vtok
