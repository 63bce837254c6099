// Copies that go past the caches, for results larger than them: an ordinary store first reads the
// line it is about to overwrite, which is a third of the traffic of a pass that reads as much as it
// writes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace vtok::VTOK_ISA {

// Copies num_bytes to `target`, of any alignment. Each thread calls stream_copy_fence() before
// others read what it copied.
inline void stream_copy(void* target, const void* source, int64_t num_bytes) {
#if defined(__AVX512F__) || defined(__AVX2__)
#ifdef __AVX512F__
  using Vector = __m512i;
  const auto move = [](char* to, const char* from) {
    _mm512_stream_si512(reinterpret_cast<Vector*>(to), _mm512_loadu_si512(from));
  };
#else
  using Vector = __m256i;
  const auto move = [](char* to, const char* from) {
    _mm256_stream_si256(reinterpret_cast<Vector*>(to),
                        _mm256_loadu_si256(reinterpret_cast<const Vector*>(from)));
  };
#endif
  constexpr int64_t kLine = sizeof(Vector);
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  const int64_t past = reinterpret_cast<uintptr_t>(to) % kLine;
  const int64_t head = past == 0 ? 0 : kLine - past;
  if (head < num_bytes) {
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + kLine <= num_bytes; i += kLine) move(to + i, from + i);
    std::memcpy(to + i, from + i, num_bytes - i);
    return;
  }
#endif
  std::memcpy(target, source, num_bytes);
}

inline void stream_copy_fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace vtok::VTOK_ISA
