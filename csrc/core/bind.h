// What every <stem>_bind.cpp needs: the tensor caster, the call context and the choice of device.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "stream.h"
#include "tensor_caster.h"

namespace vtok {

// Where and how a call runs, decided in Python: (num_threads, stream). `stream` is 0 on the CPU.
struct CallContext {
  int num_threads = 1;
  Stream stream = nullptr;
};

[[noreturn]] inline void throw_no_cuda(const char* op) {
  throw std::runtime_error(
      join_message(op, ": vtok_ext was built without CUDA, got a cuda tensor"));
}

}  // namespace vtok

namespace pybind11::detail {

template <>
struct type_caster<vtok::CallContext> {
  PYBIND11_TYPE_CASTER(vtok::CallContext, const_name("tuple[int, int]"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    value.num_threads = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 0)));
    value.stream = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 1));
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

// Calls <function>_cpu(params) or <function>_cuda(params, stream) for the device of `view`, without
// the GIL. The CUDA function selects the device itself (DeviceGuard in launch.cuh): this header
// needs no CUDA header.
#ifdef VTOK_WITH_CUDA
#define VTOK_CALL_CUDA(context, function, params) function##_cuda(params, (context).stream)
#else
#define VTOK_CALL_CUDA(context, function, params) ::vtok::throw_no_cuda(#function)
#endif
#define VTOK_CALL_DEVICE(view, context, function, params) \
  do {                                                    \
    const pybind11::gil_scoped_release no_gil;            \
    if ((view).device == ::vtok::DeviceType::kCUDA) {     \
      VTOK_CALL_CUDA(context, function, params);          \
    } else {                                              \
      function##_cpu(params);                             \
    }                                                     \
  } while (false)
