// All of CUDA C++ that kernels see under emulation. Included by core/launch.cuh in place of
// <cuda_runtime.h>.
#pragma once

#include "atomics.h"
#include "collectives.h"
#include "cuda_math.h"
#include "cuda_types.h"
#include "launch.h"
#include "shared_memory.h"

// A reference to the same array for all threads of the block; see SharedSite.
#define VTOK_SHARED(type, name, count)                                                        \
  static ::vtok::emulation::SharedSite name##_site{sizeof(type) * static_cast<size_t>(count), \
                                                   #name, 0, nullptr};                        \
  type(&name)[count] =                                                                        \
      *reinterpret_cast<type(*)[count]>(::vtok::emulation::shared_address(name##_site))
#define VTOK_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::vtok::emulation::shared_memory().dynamic_base())
#define VTOK_LAUNCH(kernel, grid, block, ...)                                              \
  ::vtok::emulation::launch(::vtok::emulation::kSharedLimit, #kernel, kernel, grid, block, \
                            __VA_ARGS__)
#define VTOK_LAUNCH_SM90(kernel, grid, block, ...)                                             \
  ::vtok::emulation::launch(::vtok::emulation::kSharedLimitSm90, #kernel, kernel, grid, block, \
                            __VA_ARGS__)
