// Python access to the options, reports and statistics of the emulation.
#include "emulation_bind.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "report.h"

namespace py = pybind11;

namespace vtok::emulation {
namespace {

ThreadOrder order_of(const std::string& name) {
  if (name == "forward") return ThreadOrder::kForward;
  if (name == "reverse") return ThreadOrder::kReverse;
  if (name == "seeded") return ThreadOrder::kSeeded;
  throw std::invalid_argument(
      "emulation_set_options: order must be 'forward', 'reverse' or 'seeded', got '" + name + "'");
}

CpAsyncMode cp_async_mode_of(const std::string& name) {
  if (name == "late") return CpAsyncMode::kLate;
  if (name == "issue") return CpAsyncMode::kIssue;
  throw std::invalid_argument("emulation_set_options: cp_async must be 'late' or 'issue', got '" +
                              name + "'");
}

py::dict options_dict(const char* order, uint64_t seed, const char* cp_async) {
  py::dict options;
  options["order"] = order;
  options["seed"] = seed;
  options["cp_async"] = cp_async;
  return options;
}

// The settings under which a kernel has to give one result: each finds faults that the others miss.
py::list configurations() {
  py::list all;
  all.append(options_dict("forward", 0, "late"));
  all.append(options_dict("reverse", 0, "late"));
  all.append(options_dict("seeded", 1, "late"));
  all.append(options_dict("seeded", 2, "issue"));
  return all;
}

py::dict statistics() {
  const Statistics statistics = get_statistics();
  py::dict result;
  result["launches"] = statistics.launches;
  result["blocks"] = statistics.blocks;
  result["threads"] = statistics.threads;
  result["switches"] = statistics.switches;
  return result;
}

}  // namespace

void bind_emulation(py::module_& m) {
  m.def(
      "emulation_set_options",
      [](const std::string& order, uint64_t seed, const std::string& cp_async) {
        set_options({order_of(order), seed, cp_async_mode_of(cp_async)});
      },
      py::arg("order") = "forward", py::arg("seed") = 0, py::arg("cp_async") = "late",
      "None; sets how the launches that follow run: thread order 'forward', 'reverse' or 'seeded', "
      "cp.async data\n"
      "arriving 'late' (when a wait forces it) or at 'issue'.");
  m.def("emulation_configurations", &configurations,
        "The option sets (keyword arguments of emulation_set_options) under which a kernel must "
        "give one result.");
  m.def("emulation_take_reports", &take_reports,
        "The findings since the last call, oldest first: unwritten outputs, damaged guard zones, "
        "copies nobody waited\n"
        "for. Empty for a correct kernel.");
  m.def("emulation_statistics", &statistics,
        "Launches, blocks, threads and switches between threads since the module was loaded.");
}

}  // namespace vtok::emulation
