// Bytes of shared memory of a block, for launches and for the emulation that checks them.
#pragma once

#include <cstddef>

namespace vtok {

// What static and dynamic arrays may take together without opting in; static ones never more.
constexpr size_t kSharedWithoutOptIn = 48 << 10;
// Launches with more dynamic bytes than this opt in, so that 16 KiB are left to static arrays.
constexpr size_t kDynamicWithoutOptIn = 32 << 10;

}  // namespace vtok
