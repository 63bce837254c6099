// Guarded "device" copies of host tensors: what a kernel under emulation reads and writes.
//
// Note [Guarded device memory]
// The last element of a buffer lies against an inaccessible page, and inaccessible pages precede
// its first page, so most accesses out of bounds fault at once, with block and thread. Where the
// host pointer's alignment leaves a gap (at most 15 bytes after the end, up to a page before the
// start) and between strided elements there are canaries: NaN when read, checked after each launch.
// Inputs are mapped read-only. Outputs hold poison that the kernel has to overwrite.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vtok::emulation {

enum class Role {
  kInput,        // copied in; a write is an error
  kOutput,       // poisoned; every element must be written; copied back
  kWorkspace,    // poisoned; copied back
  kInputOutput,  // copied in and back: an accumulator that the caller has initialised
};

class DeviceBuffer {
 public:
  // `strides` are in elements, not negative; `element_size` is 1, 2, 4 or 8 bytes. `host` must
  // outlive the buffer.
  DeviceBuffer(Role role, void* host, size_t element_size, int ndim, const int64_t* shape,
               const int64_t* strides, const char* argument_name);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  // What the kernel gets: as far from a 16-byte boundary as the host pointer. Null without
  // elements.
  void* device() const { return data_; }

  // Reports damaged canaries, as the work of `kernel`.
  void check_canaries(const std::string& kernel);

  // For a fault: whether `address` belongs to this buffer or its guards, and what it means.
  bool covers(const char* address) const;
  std::string describe(const char* address, bool is_write) const;
  // Whether [begin, end) may be written by the host on behalf of the device.
  bool is_writable(const char* begin, const char* end) const;

 private:
  void map();
  void copy_in();
  void copy_back();
  void check_all_written() const;
  void check_gaps(const std::string& kernel);
  std::string element_text(int64_t offset) const;
  template <typename Function>
  void for_each_element(Function&& function) const;

  Role role_;
  char* host_;
  int64_t element_size_;
  std::vector<int64_t> shape_, strides_;
  std::string name_;
  int64_t num_elements_ = 1;
  int64_t span_ = 0;  // elements from the first to the last, gaps included
  bool is_dense_ = false;
  int exceptions_at_start_;
  char* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  char *pages_begin_ = nullptr, *pages_end_ = nullptr;  // accessible part of the mapping
  char* data_ = nullptr;
};

// After a launch: every live buffer.
void check_device_buffers(const std::string& kernel);

// Explains a fault at `address`; empty if it is near no buffer.
std::string describe_device_address(const char* address, bool is_write);

}  // namespace vtok::emulation
