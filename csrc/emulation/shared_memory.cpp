#include "shared_memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "../core/shared_memory_limits.h"
#include "canary.h"
#include "execution.h"

namespace vtok::emulation {
namespace {

constexpr size_t kCanaryBytes = 128;  // on either side of an array
constexpr size_t kUsableBytes = 256 << 10;
constexpr size_t kGuardBytes = 1 << 20;

char* map_guarded() {
  void* memory = mmap(nullptr, kUsableBytes + 2 * kGuardBytes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* usable = static_cast<char*>(memory) + kGuardBytes;
  mprotect(usable, kUsableBytes, PROT_READ | PROT_WRITE);
  return usable;
}

size_t round_up_16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

}  // namespace

uint64_t shared_memory_launch = 0;

SharedMemory& shared_memory() {
  static SharedMemory* instance = new SharedMemory;
  return *instance;
}

SharedMemory::SharedMemory() : mapping_guard_(kGuardBytes) {
  static_begin_ = map_guarded();
  static_end_ = static_begin_ + kUsableBytes;
  dynamic_begin_ = map_guarded();
  dynamic_end_ = dynamic_begin_ + kUsableBytes;
}

void SharedMemory::begin_launch(size_t dynamic_bytes, size_t limit) {
  ++shared_memory_launch;
  static_bytes_ = 0;
  dynamic_bytes_ = dynamic_bytes;
  limit_ = limit;
  next_ = static_begin_;
  arrays_.clear();
  // The dynamic array ends at an inaccessible page, but for the slack that keeps its base 16-byte
  // aligned.
  dynamic_base_ = dynamic_end_ - round_up_16(dynamic_bytes);
  fill_canary(dynamic_base_ - kCanaryBytes, dynamic_base_);
  fill_canary(dynamic_base_ + dynamic_bytes, dynamic_end_);
}

void SharedMemory::begin_block() {
  for (const Array& array : arrays_) std::memset(array.begin, kSharedPoison, array.bytes);
  if (dynamic_bytes_ != 0) std::memset(dynamic_base_, kSharedPoison, dynamic_bytes_);
}

char* SharedMemory::place(SharedSite& site) {
  const size_t bytes = round_up_16(site.bytes);
  static_bytes_ += bytes;
  if (static_bytes_ > kSharedWithoutOptIn) {
    fail("too much static shared memory: with array '" + std::string(site.name) +
         "' the kernel uses " + std::to_string(static_bytes_) + " bytes, the limit is " +
         std::to_string(kSharedWithoutOptIn) + " (use dynamic shared memory)");
  }
  const bool opts_in = dynamic_bytes_ > kDynamicWithoutOptIn;
  const size_t limit = opts_in ? limit_ : kSharedWithoutOptIn;
  if (static_bytes_ + dynamic_bytes_ > limit) {
    fail("too much shared memory: " + std::to_string(static_bytes_) + " static and " +
         std::to_string(dynamic_bytes_) + " dynamic bytes, the limit is " + std::to_string(limit) +
         (opts_in ? "" : " without opting in"));
  }
  site.launch = shared_memory_launch;
  site.address = next_ + kCanaryBytes;
  next_ = site.address + bytes + kCanaryBytes;
  fill_canary(site.address - kCanaryBytes, site.address);
  fill_canary(site.address + site.bytes, next_);
  std::memset(site.address, kSharedPoison, site.bytes);
  arrays_.push_back({site.name, site.address, site.bytes});
  return site.address;
}

std::string SharedMemory::damaged_canary() const {
  for (const Array& array : arrays_) {
    const char* end = array.begin + array.bytes;
    const char* damage = find_damage(array.begin - kCanaryBytes, array.begin);
    if (damage != nullptr) {
      return "out-of-bounds write of shared memory, " + std::to_string(array.begin - damage) +
             " bytes before the start of array '" + array.name + "'";
    }
    damage = find_damage(end, array.begin + round_up_16(array.bytes) + kCanaryBytes);
    if (damage != nullptr) {
      return "out-of-bounds write of shared memory, " + std::to_string(damage - end) +
             " bytes past the end of array '" + array.name + "' (" + std::to_string(array.bytes) +
             " bytes)";
    }
  }
  if (find_damage(dynamic_base_ - kCanaryBytes, dynamic_base_) != nullptr) {
    return "out-of-bounds write of shared memory before the start of dynamic shared memory";
  }
  if (find_damage(dynamic_base_ + dynamic_bytes_, dynamic_end_) != nullptr) {
    return "out-of-bounds write of shared memory past the end of dynamic shared memory (" +
           std::to_string(dynamic_bytes_) + " bytes)";
  }
  return "";
}

bool SharedMemory::contains(const void* address, size_t bytes) const {
  const char* begin = static_cast<const char*>(address);
  if (begin >= dynamic_base_ && begin + bytes <= dynamic_base_ + dynamic_bytes_) return true;
  for (const Array& array : arrays_) {
    if (begin >= array.begin && begin + bytes <= array.begin + array.bytes) return true;
  }
  return false;
}

std::string SharedMemory::describe_address(const char* address) const {
  const size_t guard = mapping_guard_;
  if (address >= dynamic_begin_ - guard && address < dynamic_end_ + guard) {
    const char* end = dynamic_base_ + dynamic_bytes_;
    const bool past = address >= end;
    return std::to_string(past ? address - end : dynamic_base_ - address) + " bytes " +
           (past ? "past the end" : "before the start") + " of dynamic shared memory (" +
           std::to_string(dynamic_bytes_) + " bytes)";
  }
  if (address >= static_begin_ - guard && address < static_end_ + guard) {
    return "the address is outside every static array of the kernel";
  }
  return "";
}

void check_shared(const void* address, size_t bytes, const char* operation) {
  if (shared_memory().contains(address, bytes)) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s: %zu bytes at %p are not inside one shared array", operation,
                bytes, address);
  fail(text);
}

}  // namespace vtok::emulation
