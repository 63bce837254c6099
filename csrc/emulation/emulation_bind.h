// Python access to the options, reports and statistics of the emulation.
#pragma once

#include <pybind11/pybind11.h>

namespace vtok::emulation {

void bind_emulation(pybind11::module_& m);

}  // namespace vtok::emulation
