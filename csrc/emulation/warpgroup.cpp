#include "warpgroup.h"

#include <deque>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "execution.h"
#include "report.h"

namespace vtok::emulation {
namespace {

struct Issued {
  float* sums;
  const void* a_rows;
  const void* b_rows;
  int step;
  WarpgroupProduct product;
};

// Products of one thread. The true sums of unfinished ones are kept here.
struct Products {
  std::deque<Issued> pending;
  std::deque<size_t> groups;  // how many products each committed group has
  size_t uncommitted = 0;
  std::map<float*, std::vector<float>> sums;

  void clear() {
    pending.clear();
    groups.clear();
    uncommitted = 0;
    sums.clear();
  }
};

std::vector<Products> all_products(1024);  // by thread
bool any_used = false;
bool runs_late = false;
bool never_waited_reported = false;
const char* kernel_name = "";

void run_first(Products& products) {
  const Issued& issued = products.pending.front();
  issued.product(products.sums.at(issued.sums).data(), issued.a_rows, issued.b_rows, issued.step,
                 current_thread());
  products.pending.pop_front();
}

}  // namespace

void warpgroup_issue(float* sums, size_t count, const void* a_rows, const void* b_rows, int step,
                     WarpgroupProduct product) {
  check_alignment(a_rows, 1024, "wgmma operand a");
  check_alignment(b_rows, 1024, "wgmma operand b");
  any_used = true;
  Products& products = all_products[current_thread()];
  if (products.sums.find(sums) == products.sums.end()) {
    products.sums.emplace(sums, std::vector<float>(sums, sums + count));
    for (size_t i = 0; i < count; ++i) sums[i] = std::numeric_limits<float>::quiet_NaN();
  }
  products.pending.push_back({sums, a_rows, b_rows, step, product});
  ++products.uncommitted;
  if (!runs_late) run_first(products);
}

void warpgroup_commit_products() {
  Products& products = all_products[current_thread()];
  products.groups.push_back(products.uncommitted);
  products.uncommitted = 0;
}

void warpgroup_wait_products(size_t num_pending) {
  Products& products = all_products[current_thread()];
  if (runs_late && !products.pending.empty()) yield_to_others();
  while (products.groups.size() > num_pending) {
    for (size_t i = 0; runs_late && i < products.groups.front(); ++i) run_first(products);
    products.groups.pop_front();
  }
  if (!products.groups.empty() || products.uncommitted > 0) return;
  for (const auto& [sums, values] : products.sums) {
    for (size_t i = 0; i < values.size(); ++i) sums[i] = values[i];
  }
  products.sums.clear();
}

void warpgroup_begin_launch(const char* kernel) {
  kernel_name = kernel;
  never_waited_reported = false;
  runs_late = get_options().cp_async == CpAsyncMode::kIssue;
}

void warpgroup_finish_thread() {
  if (!any_used) return;
  Products& products = all_products[current_thread()];
  const bool unfinished = !products.sums.empty();
  products.clear();
  if (!unfinished || never_waited_reported) return;
  never_waited_reported = true;
  add_report(std::string(kernel_name) + ": thread (" + std::to_string(threadIdx.x) +
             ", 0, 0): wgmma never waited for when the thread exits");
}

void warpgroup_reset() {
  for (Products& products : all_products) products.clear();
}

}  // namespace vtok::emulation
