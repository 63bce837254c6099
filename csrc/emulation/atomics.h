// Atomic read-modify-write operations. One thread runs at a time, so plain code is atomic. A thread
// that spins on another one never ends here, since nothing switches inside a loop of atomics.
#pragma once

#include <type_traits>

#include "execution.h"

namespace vtok::emulation {

template <typename T, typename Function>
inline T update(T* address, const char* operation, Function&& function) {
  check_alignment(address, sizeof(T), operation);
  const T old = *address;
  *address = function(old);
  return old;
}

// Integer overflow wraps on the device.
template <typename T>
inline T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  } else {
    return a + b;
  }
}

// The types that CUDA overloads the integer atomics for.
template <typename T>
constexpr bool is_atomic_integer =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <typename T>
constexpr bool is_ordered_atomic = is_atomic_integer<T> || std::is_same_v<T, long long>;

// Keeps a parameter out of template argument deduction: atomicAdd(&float_variable, 1) converts
// the 1.
template <typename T>
struct Identity {
  using type = T;
};
template <typename T>
using NoDeduce = typename Identity<T>::type;

}  // namespace vtok::emulation

template <typename T>
inline T atomicAdd(T* address, vtok::emulation::NoDeduce<T> value) {
  static_assert(vtok::emulation::is_atomic_integer<T> || std::is_same_v<T, float> ||
                    std::is_same_v<T, double>,
                "atomicAdd takes int, unsigned, unsigned long long, float or double");
  return vtok::emulation::update(address, "atomicAdd",
                                 [&](T old) { return vtok::emulation::wrapping_add(old, value); });
}

template <typename T>
inline T atomicMax(T* address, vtok::emulation::NoDeduce<T> value) {
  static_assert(vtok::emulation::is_ordered_atomic<T>,
                "atomicMax takes (unsigned) int or (unsigned) long long");
  return vtok::emulation::update(address, "atomicMax",
                                 [&](T old) { return old < value ? value : old; });
}

template <typename T>
inline T atomicMin(T* address, vtok::emulation::NoDeduce<T> value) {
  static_assert(vtok::emulation::is_ordered_atomic<T>,
                "atomicMin takes (unsigned) int or (unsigned) long long");
  return vtok::emulation::update(address, "atomicMin",
                                 [&](T old) { return value < old ? value : old; });
}

template <typename T>
inline T atomicOr(T* address, vtok::emulation::NoDeduce<T> value) {
  static_assert(vtok::emulation::is_atomic_integer<T>,
                "atomicOr takes int, unsigned or unsigned long long");
  return vtok::emulation::update(address, "atomicOr", [&](T old) { return old | value; });
}

template <typename T>
inline T atomicAnd(T* address, vtok::emulation::NoDeduce<T> value) {
  static_assert(vtok::emulation::is_atomic_integer<T>,
                "atomicAnd takes int, unsigned or unsigned long long");
  return vtok::emulation::update(address, "atomicAnd", [&](T old) { return old & value; });
}

template <typename T>
inline T atomicExch(T* address, vtok::emulation::NoDeduce<T> value) {
  static_assert(vtok::emulation::is_atomic_integer<T> || std::is_same_v<T, float>,
                "atomicExch takes int, unsigned, unsigned long long or float");
  return vtok::emulation::update(address, "atomicExch", [&](T) { return value; });
}

template <typename T>
inline T atomicCAS(T* address, vtok::emulation::NoDeduce<T> expected,
                   vtok::emulation::NoDeduce<T> desired) {
  static_assert(vtok::emulation::is_atomic_integer<T> || std::is_same_v<T, unsigned short>,
                "atomicCAS takes int, unsigned, unsigned short or unsigned long long");
  return vtok::emulation::update(address, "atomicCAS",
                                 [&](T old) { return old == expected ? desired : old; });
}
