// The process-wide options, statistics and reports.
#include "report.h"

#include <mutex>
#include <utility>

namespace vtok::emulation {
namespace {

struct State {
  std::mutex mutex;
  Options options;
  Statistics statistics;
  std::vector<std::string> reports;
};

State& state() {
  static State instance;
  return instance;
}

}  // namespace

Options get_options() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return state().options;
}

void set_options(const Options& options) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().options = options;
}

Statistics get_statistics() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return state().statistics;
}

void add_statistics(const Statistics& launch) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  Statistics& total = state().statistics;
  total.launches += launch.launches;
  total.blocks += launch.blocks;
  total.threads += launch.threads;
  total.switches += launch.switches;
}

void add_report(std::string message) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().reports.push_back(std::move(message));
}

std::vector<std::string> take_reports() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return std::exchange(state().reports, {});
}

}  // namespace vtok::emulation
