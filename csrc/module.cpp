// The one compiled module, vtok_ext._C: a bind_<stem>() line per op, and build_info().
#include <pybind11/pybind11.h>

#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"

#ifdef VTOK_EMULATE_CUDA
#include "emulation/emulation_bind.h"
#endif

namespace py = pybind11;

namespace vtok {

void bind_vectorized(py::module_& m);
void bind_causal_conv3d(py::module_& m);
void bind_fsq(py::module_& m);
void bind_fsq_entropy(py::module_& m);
void bind_alpha_blend(py::module_& m);
void bind_temporal_resample(py::module_& m);
void bind_triplane_gather(py::module_& m);
void bind_norm_act(py::module_& m);
void bind_residual_pool(py::module_& m);

static py::dict build_info() {
  py::dict info;
  info["version"] = VTOK_VERSION;
  info["compiler"] = VTOK_COMPILER;
#ifdef VTOK_CUDA_VERSION
  info["cuda_version"] = VTOK_CUDA_VERSION;
  info["cuda_architectures"] = VTOK_CUDA_ARCHITECTURES;
#else
  info["cuda_version"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
#ifdef VTOK_EMULATE_CUDA
  info["cuda_emulation"] = true;
#else
  info["cuda_emulation"] = false;
#endif
  info["cpu_isa"] = name_of(cpu_isa());
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace vtok

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels of vtok_ext. Use them through vtok_ext.ops: the functions here check only "
      "memory safety.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const vtok::type_mismatch& error) {
      py::set_error(PyExc_TypeError, error.what());
    }
  });
  m.def("build_info", &vtok::build_info,
        "Version, compiler, CUDA version and architectures, CPU instruction set.");
  vtok::bind_vectorized(m);
  vtok::bind_causal_conv3d(m);
  vtok::bind_fsq(m);
  vtok::bind_fsq_entropy(m);
  vtok::bind_alpha_blend(m);
  vtok::bind_temporal_resample(m);
  vtok::bind_triplane_gather(m);
  vtok::bind_norm_act(m);
  vtok::bind_residual_pool(m);
#ifdef VTOK_EMULATE_CUDA
  vtok::emulation::bind_emulation(m);
#endif
}
