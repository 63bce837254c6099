// launch(): what VTOK_LAUNCH becomes under emulation. Limits are those of sm_80 to sm_90.
#pragma once

#include <tuple>
#include <utility>

#include "../core/stream.h"
#include "scheduler.h"

namespace vtok::emulation {

// Dynamic shared memory that a kernel may ask for: 99 KiB on the smallest supported device (sm_86),
// 227 KiB on sm_90.
constexpr size_t kSharedLimit = 99 << 10;
constexpr size_t kSharedLimitSm90 = 227 << 10;

// Throws std::runtime_error for impossible launch dimensions and for everything that the launch
// finds wrong.
void launch_checked(const Launch& launch);

template <typename... Parameters, typename... Arguments>
void launch(size_t shared_limit, const char* name, void (*kernel)(Parameters...), dim3 grid,
            dim3 block, size_t dynamic_shared_bytes, Stream /*stream*/, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                "the launch passes every kernel parameter");
  // Converted once to the kernel's parameter types, as <<<>>> does; every thread gets its own copy
  // of them.
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  Launch launch;
  launch.name = name;
  launch.grid = grid;
  launch.block = block;
  launch.dynamic_shared_bytes = dynamic_shared_bytes;
  launch.shared_limit = shared_limit;
  launch.invoke = [](void* pointer) {
    const Call& typed = *static_cast<const Call*>(pointer);
    std::apply(typed.kernel, typed.arguments);
  };
  launch.arguments = &call;
  launch_checked(launch);
}

}  // namespace vtok::emulation
