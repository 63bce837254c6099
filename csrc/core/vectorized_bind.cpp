// Lets the tests measure the stated errors of vectorized.h and half.h; no op calls this.
#include "bind.h"
#include "vectorized.h"

namespace vtok {
namespace {

template <typename Function>
void map_float(const TensorView& x, const OutputView& y, const Function& function) {
  const float* in = x.data_as<float>();
  float* out = y.data_as<float>();
  for (int64_t i = 0; i < x.num_elements(); ++i) out[i] = function(in[i]);
}

void evaluate(const std::string& name, const TensorView& x, const OutputView& y) {
  VTOK_CHECK_VALUE(x.num_dims == 1 && y.num_dims == 1 && x.shape[0] == y.shape[0] &&
                       (x.shape[0] <= 1 || (x.strides[0] == 1 && y.strides[0] == 1)),
                   "evaluate: x and y must be contiguous [N], got ", shape_string(x), " and ",
                   shape_string(y));
  if (name == "exp") return map_float(x, y, [](float v) { return exp_accurate(v); });
  if (name == "log") return map_float(x, y, [](float v) { return log_accurate(v); });
  if (name == "tanh") return map_float(x, y, [](float v) { return tanh_accurate(v); });
  if (name == "sigmoid") return map_float(x, y, [](float v) { return sigmoid_accurate(v); });
  if (name == "float16")
    return map_float(x, y, [](float v) { return to_float(from_float<float16>(v)); });
  if (name == "bfloat16")
    return map_float(x, y, [](float v) { return to_float(from_float<bfloat16>(v)); });
  VTOK_CHECK_VALUE(false,
                   "evaluate: name must be exp, log, tanh, sigmoid, float16 or bfloat16, "
                   "got ",
                   name);
}

}  // namespace

void bind_vectorized(pybind11::module_& m) {
  m.def("evaluate", evaluate, pybind11::arg("name"), pybind11::arg("x"), pybind11::arg("y"));
}

}  // namespace vtok
