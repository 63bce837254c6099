// Shared memory of the block that runs: static arrays and one dynamic array, poisoned at block
// start, with canaries around every array and inaccessible pages around the whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vtok::emulation {

// One per VTOK_SHARED in the source (per instantiation, inside templates). It gets its place at
// first use in a launch.
struct SharedSite {
  size_t bytes;
  const char* name;
  uint64_t launch;  // the launch for which `address` is valid
  char* address;
};

class SharedMemory {
 public:
  SharedMemory();

  void begin_launch(size_t dynamic_bytes, size_t limit);
  void begin_block();

  // A message if some thread of the block wrote around a shared array, else an empty string.
  std::string damaged_canary() const;

  // Places a static array; fails the launch beyond 48 KiB.
  char* place(SharedSite& site);
  char* dynamic_base() const { return dynamic_base_; }

  // Whether [address, address + bytes) lies inside one shared array.
  bool contains(const void* address, size_t bytes) const;

  // For a fault: where `address` lies relative to shared memory; empty if it lies elsewhere.
  std::string describe_address(const char* address) const;

 private:
  struct Array {
    const char* name;
    char* begin;
    size_t bytes;
  };

  size_t static_bytes_ = 0, dynamic_bytes_ = 0, limit_ = 0;
  char *static_begin_, *static_end_, *dynamic_begin_,
      *dynamic_end_;  // usable parts of the two mappings
  size_t mapping_guard_;
  char* next_ = nullptr;  // end of the last placed static array and its canary
  char* dynamic_base_ = nullptr;
  std::vector<Array> arrays_;
};

SharedMemory& shared_memory();

// Number of the launch that runs, from 1.
extern uint64_t shared_memory_launch;

// Where the array of `site` is in this launch; the same for all threads of a block.
inline char* shared_address(SharedSite& site) {
  return site.launch == shared_memory_launch ? site.address : shared_memory().place(site);
}

// Fails unless [address, address + bytes) lies inside one shared array.
void check_shared(const void* address, size_t bytes, const char* operation);

}  // namespace vtok::emulation
