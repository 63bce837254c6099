// The bit patterns that mark memory nobody has written and memory nobody may write.
#pragma once

#include <cstdint>
#include <cstring>

namespace vtok::emulation {

// Shared memory at block start and under a cp.async that has not landed: all ones, a NaN of every
// floating type and -1.
constexpr int kSharedPoison = 0xff;

// Around arrays. As 16-bit units so that it reads as NaN in float16, bfloat16 and float32, and
// unlike kSharedPoison, so that poison copied out of bounds still shows.
constexpr unsigned char kCanary[2] = {0xc5, 0xff};

inline unsigned char canary_byte(const char* address) {
  return kCanary[reinterpret_cast<uintptr_t>(address) & 1u];
}

inline void fill_canary(char* begin, char* end) {
  for (; begin < end; ++begin) *begin = static_cast<char>(canary_byte(begin));
}

// The first byte that is no canary any more, or null.
inline const char* find_damage(const char* begin, const char* end) {
  constexpr uint64_t kWord = 0xffc5ffc5ffc5ffc5ull;
  for (; begin < end && reinterpret_cast<uintptr_t>(begin) % 8 != 0; ++begin) {
    if (static_cast<unsigned char>(*begin) != canary_byte(begin)) return begin;
  }
  for (; begin + 8 <= end; begin += 8) {
    uint64_t word;
    std::memcpy(&word, begin, 8);
    if (word != kWord) break;
  }
  for (; begin < end; ++begin) {
    if (static_cast<unsigned char>(*begin) != canary_byte(begin)) return begin;
  }
  return nullptr;
}

}  // namespace vtok::emulation
