#include "launch.h"

#include <mutex>
#include <stdexcept>

#include "async_copy.h"
#include "device_memory.h"
#include "warpgroup.h"

namespace vtok::emulation {
namespace {

std::string dim_text(const dim3& dim) {
  return "(" + std::to_string(dim.x) + ", " + std::to_string(dim.y) + ", " + std::to_string(dim.z) +
         ")";
}

void check_limits(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const auto fail_launch = [&](const std::string& text) {
    throw std::runtime_error(launch.name + ": " + text);
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    fail_launch("grid must not be empty, got " + dim_text(grid) +
                " (return early for zero elements)");
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail_launch("grid must be at most (2147483647, 65535, 65535), got " + dim_text(grid));
  }
  if (block.x == 0 || block.y == 0 || block.z == 0)
    fail_launch("block must not be empty, got " + dim_text(block));
  if (block.x > 1024 || block.y > 1024 || block.z > 64 ||
      uint64_t(block.x) * block.y * block.z > 1024) {
    fail_launch("block must be at most (1024, 1024, 64) and 1024 threads, got " + dim_text(block));
  }
  if (launch.dynamic_shared_bytes > launch.shared_limit) {
    fail_launch("too much dynamic shared memory: the limit is " +
                std::to_string(launch.shared_limit) + " bytes, got " +
                std::to_string(launch.dynamic_shared_bytes));
  }
}

// "(kernel<T>)" -> "kernel<T>"
std::string without_parentheses(const std::string& name) {
  if (name.size() > 2 && name.front() == '(' && name.back() == ')')
    return name.substr(1, name.size() - 2);
  return name;
}

}  // namespace

void launch_checked(const Launch& request) {
  static std::mutex* mutex =
      new std::mutex;  // threads of one launch at a time own threadIdx and the fibers
  const std::lock_guard<std::mutex> lock(*mutex);
  Launch launch = request;
  launch.name = without_parentheses(request.name);
  check_limits(launch);
  async_copy_begin_launch(launch.name.c_str());
  warpgroup_begin_launch(launch.name.c_str());
  run_blocks(launch);
  check_device_buffers(launch.name);
}

}  // namespace vtok::emulation
