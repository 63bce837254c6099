// pybind11 caster: torch.Tensor -> TensorView / OutputView / WorkspaceView, by duck typing and
// without libtorch.
//
// Only a plain torch.Tensor or torch.nn.Parameter is accepted: for a subclass (FakeTensor, DTensor,
// ...) the pointer is absent or is not the data that the Python object stands for. Under the CUDA
// emulation every view refers to a guarded copy.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "tensor_view.h"

#ifdef VTOK_EMULATE_CUDA
#include "../emulation/device_memory.h"
#endif

namespace vtok {

struct TorchObjects {
  pybind11::object tensor, parameter, strided;
  pybind11::object dtypes[8];  // in the order of enum DType
};

// Looked up on first use: torch is imported by then, since the caller holds a tensor.
inline const TorchObjects& torch_objects() {
  // Not a plain static: threads that wait for one would hold the GIL, which Python code needs.
  PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<TorchObjects> storage;
  const auto look_up = [] {
    const auto torch = pybind11::module_::import("torch");
    static const char* const names[] = {"float32", "float64", "float16", "bfloat16",
                                        "uint8",   "int32",   "int64",   "bool"};
    TorchObjects found{
        torch.attr("Tensor"), torch.attr("nn").attr("Parameter"), torch.attr("strided"), {}};
    for (int i = 0; i < 8; ++i) found.dtypes[i] = torch.attr(names[i]);
    return found;
  };
  // Never freed: the interpreter may already be gone at exit.
  return storage.call_once_and_store_result(look_up).get_stored();
}

inline std::string type_name(pybind11::handle object) {
  const auto type = pybind11::type::handle_of(object);
  const std::string module = pybind11::str(type.attr("__module__"));
  return module + "." + std::string(pybind11::str(type.attr("__qualname__")));
}

inline DType read_dtype(pybind11::handle tensor) {
  const pybind11::object dtype = tensor.attr("dtype");
  const auto& objects = torch_objects();
  for (int i = 0; i < 8; ++i) {
    if (dtype.is(objects.dtypes[i])) return static_cast<DType>(i);
  }
  throw type_mismatch(join_message(
      "vtok_ext: tensor dtype must be a floating, int32, int64, uint8 or bool type, got ",
      std::string(pybind11::str(dtype))));
}

inline void read_device(pybind11::handle tensor, TensorView& view) {
  if (tensor.attr("is_cpu").cast<bool>()) {
    view.device = DeviceType::kCPU;
  } else if (tensor.attr("is_cuda").cast<bool>()) {
    view.device = DeviceType::kCUDA;
    view.device_index = tensor.attr("get_device")().cast<int>();
  } else {
    throw std::invalid_argument(
        join_message("vtok_ext: tensor must be on cpu or cuda and have memory, got device ",
                     std::string(pybind11::str(tensor.attr("device")))));
  }
}

inline void read_tensor(pybind11::handle tensor, TensorView& view) {
  const auto& objects = torch_objects();
  const auto type = pybind11::type::handle_of(tensor);
  VTOK_CHECK_TYPE(type.is(objects.tensor) || type.is(objects.parameter),
                  "vtok_ext: argument must be a plain torch.Tensor, got ", type_name(tensor));
  const pybind11::object layout = tensor.attr("layout");
  VTOK_CHECK_VALUE(layout.is(objects.strided), "vtok_ext: tensor must have a strided layout, got ",
                   std::string(pybind11::str(layout)));
  view.dtype = read_dtype(tensor);
  read_device(tensor, view);
  const auto shape = pybind11::reinterpret_borrow<pybind11::tuple>(tensor.attr("shape"));
  const auto strides =
      pybind11::reinterpret_steal<pybind11::tuple>(tensor.attr("stride")().release());
  VTOK_CHECK_VALUE(shape.size() <= size_t{kMaxDims}, "vtok_ext: tensor must have at most ",
                   kMaxDims, " dimensions, got ", shape.size());
  view.num_dims = static_cast<int>(shape.size());
  for (int dim = 0; dim < view.num_dims; ++dim) {
    view.shape[dim] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), dim));
    view.strides[dim] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), dim));
  }
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  VTOK_CHECK_VALUE(
      view.data != nullptr || view.num_elements() == 0,
      "vtok_ext: tensor must have memory (not fake, meta or freed), got a null pointer for shape ",
      shape_string(view));
}

#ifdef VTOK_EMULATE_CUDA
inline emulation::Role role_of(const TensorView*) {
  return emulation::Role::kInput;
}
inline emulation::Role role_of(const OutputView*) {
  return emulation::Role::kOutput;
}
inline emulation::Role role_of(const WorkspaceView*) {
  return emulation::Role::kWorkspace;
}
#endif

// Shared body of the three casters. `None` becomes a view with a null pointer and no dimensions: an
// absent optional argument.
template <typename View>
struct ViewCaster {
  bool load(pybind11::handle source, bool) {
    if (source.is_none()) return true;
    read_tensor(source, value);
#ifdef VTOK_EMULATE_CUDA
    VTOK_CHECK_VALUE(value.device == DeviceType::kCPU,
                     "vtok_ext: the CUDA emulation takes cpu tensors");
    // The parameter's name is not known here: reports say, for example, "argument float32 [3, 6]".
    const std::string label = std::string(name_of(value.dtype)) + " " + shape_string(value);
    copy = std::make_unique<emulation::DeviceBuffer>(role_of(&value), value.data,
                                                     size_of(value.dtype), value.num_dims,
                                                     value.shape, value.strides, label.c_str());
    value.data = copy->device();
    value.device = DeviceType::kCUDA;
#endif
    return true;
  }

  View value;
#ifdef VTOK_EMULATE_CUDA
  std::unique_ptr<emulation::DeviceBuffer> copy;
#endif
};

}  // namespace vtok

namespace pybind11::detail {

#define VTOK_VIEW_CASTER(View)                                    \
  template <>                                                     \
  struct type_caster<vtok::View> : vtok::ViewCaster<vtok::View> { \
    static constexpr auto name = const_name("torch.Tensor");      \
    template <typename>                                           \
    using cast_op_type = const vtok::View&;                       \
    explicit operator const vtok::View&() { return this->value; } \
  };
VTOK_VIEW_CASTER(TensorView)
VTOK_VIEW_CASTER(OutputView)
VTOK_VIEW_CASTER(WorkspaceView)
#undef VTOK_VIEW_CASTER

}  // namespace pybind11::detail
