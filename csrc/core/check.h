// Errors in the house form: "op: argument must be REQUIREMENT, got ACTUAL".
// ValueCheck -> Python ValueError, TypeCheck -> TypeError, CUDA failures -> RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace vtok {

// Becomes TypeError in Python (registered in module.cpp); std::invalid_argument becomes ValueError.
class type_mismatch : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string join_message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace vtok

#define VTOK_CHECK_VALUE(condition, ...)                              \
  do {                                                                \
    if (!(condition)) {                                               \
      throw std::invalid_argument(::vtok::join_message(__VA_ARGS__)); \
    }                                                                 \
  } while (false)

#define VTOK_CHECK_TYPE(condition, ...)                               \
  do {                                                                \
    if (!(condition)) {                                               \
      throw ::vtok::type_mismatch(::vtok::join_message(__VA_ARGS__)); \
    }                                                                 \
  } while (false)
