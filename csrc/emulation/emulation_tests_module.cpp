// _emulation_tests: the right and wrong kernels, called on guarded copies of numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "device_memory.h"
#include "emulation_bind.h"
#include "emulation_tests.h"

namespace py = pybind11;
using vtok::bfloat16;
using vtok::float16;
using vtok::emulation::DeviceBuffer;
using vtok::emulation::Role;
namespace tests = vtok::emulation_tests;

namespace {

// A numpy array on the "device" for the length of one call.
class DeviceArray {
 public:
  DeviceArray(Role role, py::array array, const char* name)
      : array_(std::move(array)),
        shape_(array_.shape(), array_.shape() + array_.ndim()),
        strides_(strides_of(array_)),
        buffer_(role, const_cast<void*>(array_.data()), static_cast<size_t>(array_.itemsize()),
                static_cast<int>(array_.ndim()), shape_.data(), strides_.data(), name) {}

  template <typename T>
  T* as() const {
    return static_cast<T*>(buffer_.device());
  }
  int size(int dim) const { return static_cast<int>(shape_[static_cast<size_t>(dim)]); }
  int64_t stride(int dim) const { return strides_[static_cast<size_t>(dim)]; }
  int num_elements() const { return static_cast<int>(array_.size()); }

 private:
  static std::vector<int64_t> strides_of(const py::array& array) {
    std::vector<int64_t> strides(array.strides(), array.strides() + array.ndim());
    for (int64_t& stride : strides) stride /= array.itemsize();
    return strides;
  }

  py::array array_;
  std::vector<int64_t> shape_, strides_;
  DeviceBuffer buffer_;
};

struct Input : DeviceArray {
  Input(py::array array, const char* name) : DeviceArray(Role::kInput, std::move(array), name) {}
};

struct Output : DeviceArray {
  Output(py::array array, const char* name) : DeviceArray(Role::kOutput, std::move(array), name) {}
};

template <typename T>
using Matmul = void (*)(const T*, const T*, float*, int, int, int);

template <typename T, Matmul<T> function>
void bind_matmul(py::module_& m, const char* name) {
  m.def(name, [](py::array a, py::array b, py::array c) {
    const Input da(a, "a"), db(b, "b");
    const Output dc(c, "c");
    function(da.as<T>(), db.as<T>(), dc.as<float>(), da.size(0), db.size(0), da.size(1));
  });
}

// Calls function(input, output, number) for arrays of element types X and Y.
template <typename X, typename Y, typename Function>
void bind_map(py::module_& m, const char* name, Function function) {
  m.def(name, [function](py::array x, py::array y) {
    const Input dx(x, "x");
    const Output dy(y, "y");
    function(dx.as<X>(), dy.as<Y>(), dx.num_elements());
  });
}

void bind_matmuls(py::module_& m) {
  bind_matmul<float16, tests::matmul_f16>(m, "matmul_f16");
  bind_matmul<bfloat16, tests::matmul_bf16>(m, "matmul_bf16");
  bind_matmul<float, tests::matmul_tf32>(m, "matmul_tf32");
  m.def("transposed_matmul", [](py::array a, py::array b, py::array c) {
    const Input da(a, "a"), db(b, "b");
    tests::transposed_matmul(da.as<float16>(), db.as<float16>(), Output(c, "c").as<float>());
  });
  m.def("small_matmul", [](py::array a, py::array b, py::array c) {
    const Input da(a, "a"), db(b, "b");
    tests::small_matmul(da.as<bfloat16>(), db.as<bfloat16>(), Output(c, "c").as<float>());
  });
}

void bind_right_kernels(py::module_& m) {
  m.def("block_sum", [](py::array x, py::array sums) {
    const Input dx(x, "x");
    tests::block_sum(dx.as<float>(), Output(sums, "sums").as<float>(), dx.size(0), dx.size(1));
  });
  m.def("compact", [](py::array values, py::array kept, py::array num_kept) {
    const Input dv(values, "values");
    const Output dk(kept, "kept"), dn(num_kept, "num_kept");
    tests::compact(dv.as<int>(), dk.as<int>(), dn.as<int>(), dv.num_elements());
  });
  m.def("histogram", [](py::array values, py::array counts) {
    const Input dv(values, "values");
    const Output dc(counts, "counts");
    tests::histogram(dv.as<int>(), dc.as<int>(), dv.num_elements(), dc.num_elements());
  });
  m.def("add_to", [](py::array x, py::array sum) {
    const Input dx(x, "x");
    const DeviceArray ds(Role::kInputOutput, sum, "sum");
    tests::add_to(dx.as<float>(), ds.as<float>(), dx.num_elements());
  });
  m.def("copy_elements", [](py::array x, py::array y, int64_t y_stride) {
    const Input dx(x, "x");
    const Output dy(y, "y");
    tests::copy_elements(dx.as<float>(), dy.as<float>(), dx.size(0), dx.size(1), dx.stride(0),
                         y_stride != 0 ? y_stride : dy.stride(0));
  });
  m.def("fill_bytes", [](py::array y, int num_values, int value) {
    const Output dy(y, "y");
    tests::fill_bytes(dy.as<unsigned char>(), num_values, static_cast<unsigned char>(value));
  });
  bind_map<float, float>(m, "reverse_in_large_shared", tests::reverse_in_large_shared);
  bind_map<float, float>(m, "reverse_in_sm90_shared", tests::reverse_in_sm90_shared);
  bind_map<float, float>(m, "early_exit",
                         [](const float* x, float* y, int) { tests::early_exit(x, y); });
  bind_map<int, int>(m, "half_warps", [](const int* x, int* y, int) { tests::half_warps(x, y); });
  bind_map<int, int>(m, "barrier_votes", tests::barrier_votes);
  bind_map<float, float>(m, "copy_vectors", tests::copy_vectors);
}

}  // namespace

PYBIND11_MODULE(_emulation_tests, m) {
  m.doc() = "Kernels that test the host emulation of CUDA.";
  vtok::emulation::bind_emulation(m);
  bind_matmuls(m);
  bind_right_kernels(m);
  m.def("run_wrong_kernel", [](const std::string& name, py::array x, py::array y) {
    const Input dx(x, "x");
    const Output dy(y, "y");
    tests::run_wrong_kernel(name, dx.as<float>(), dy.as<float>(), dx.num_elements());
  });
  m.def("many_threads", [](py::array y, int num_blocks) {
    tests::many_threads(Output(y, "y").as<float>(), num_blocks);
  });
}
