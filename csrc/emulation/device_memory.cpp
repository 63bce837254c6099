#include "device_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "canary.h"
#include "cuda_types.h"
#include "report.h"

namespace vtok::emulation {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<DeviceBuffer*> buffers;
};

Registry& registry() {
  static Registry* instance = new Registry;
  return *instance;
}

// Poison of outputs, by element size: a NaN with a rare payload for the floating types. Single
// bytes have no rare value, so their poison depends on the position and only several of them in a
// row count as unwritten.
constexpr uint64_t kPoison16 = 0xffa5, kPoison32 = 0xffa5b35d, kPoison64 = 0xfff5a5b35dffa596;
// A written byte equals its poison with probability 1 / 256, four in a row with 2^-32.
constexpr int kBytesInARow = 4;
constexpr int kMaxDims = 16;

unsigned char poison_byte(int64_t offset) {
  const uint64_t hash = static_cast<uint64_t>(offset) * 0x9e3779b97f4a7c15ull;
  return static_cast<unsigned char>(0x80 | (hash >> 57));  // never 0 or 1: exact for bool
}

uint64_t poison_of(int64_t element_size, int64_t offset) {
  switch (element_size) {
    case 1: return poison_byte(offset);
    case 2: return kPoison16;
    case 4: return kPoison32;
    default: return kPoison64;
  }
}

// Copies one element; with the size known to the compiler each case is a single load and store.
void copy_element(void* to, const void* from, int64_t element_size) {
  switch (element_size) {
    case 1: std::memcpy(to, from, 1); break;
    case 2: std::memcpy(to, from, 2); break;
    case 4: std::memcpy(to, from, 4); break;
    default: std::memcpy(to, from, 8); break;
  }
}

size_t round_up(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

bool is_dense(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  std::vector<size_t> order(shape.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t dim : order) {
    if (shape[dim] == 1) continue;
    if (strides[dim] != expected) return false;
    expected *= shape[dim];
  }
  return true;
}

}  // namespace

DeviceBuffer::DeviceBuffer(Role role, void* host, size_t element_size, int ndim,
                           const int64_t* shape, const int64_t* strides, const char* argument_name)
    : role_(role),
      host_(static_cast<char*>(host)),
      element_size_(static_cast<int64_t>(element_size)),
      shape_(shape, shape + ndim),
      strides_(strides, strides + ndim),
      name_(argument_name),
      exceptions_at_start_(std::uncaught_exceptions()) {
  if (element_size != 1 && element_size != 2 && element_size != 4 && element_size != 8) {
    throw std::invalid_argument("emulation: element size of " + name_ +
                                " must be 1, 2, 4 or 8 bytes, got " + std::to_string(element_size));
  }
  if (ndim > kMaxDims) {
    throw std::invalid_argument("emulation: " + name_ + " must have at most " +
                                std::to_string(kMaxDims) + " dimensions, got " +
                                std::to_string(ndim));
  }
  for (int dim = 0; dim < ndim; ++dim) {
    if (strides_[dim] < 0) {
      throw std::invalid_argument("emulation: strides of " + name_ + " must not be negative, got " +
                                  std::to_string(strides_[dim]) + " in dimension " +
                                  std::to_string(dim));
    }
    num_elements_ *= shape_[dim];
  }
  if (num_elements_ == 0) return;
  span_ = 1;
  for (int dim = 0; dim < ndim; ++dim) span_ += (shape_[dim] - 1) * strides_[dim];
  is_dense_ = is_dense(shape_, strides_);
  map();
  copy_in();
  if (role_ == Role::kInput)
    mprotect(pages_begin_, static_cast<size_t>(pages_end_ - pages_begin_), PROT_READ);
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().buffers.push_back(this);
}

DeviceBuffer::~DeviceBuffer() {
  if (num_elements_ == 0) return;
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    auto& buffers = registry().buffers;
    buffers.erase(std::find(buffers.begin(), buffers.end(), this));
  }
  // A launch that threw left its outputs half done: that is reported already.
  const bool launch_failed = std::uncaught_exceptions() > exceptions_at_start_;
  if (role_ == Role::kOutput && !launch_failed) check_all_written();
  if (role_ != Role::kInput) copy_back();
  munmap(mapping_, mapping_bytes_);
}

void DeviceBuffer::map() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto bytes = static_cast<size_t>(span_ * element_size_);
  const size_t accessible = round_up(bytes + 16, page);
  // Address space costs nothing: guards as large as the buffer catch strides of any dimension that
  // go too far.
  const size_t guard = round_up(std::max<size_t>(bytes, size_t{1} << 20), page);
  mapping_bytes_ = accessible + 2 * guard;
  void* memory =
      mmap(nullptr, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  pages_begin_ = mapping_ + guard;
  pages_end_ = pages_begin_ + accessible;
  mprotect(pages_begin_, accessible, PROT_READ | PROT_WRITE);
  const size_t misalignment = reinterpret_cast<uintptr_t>(host_) % 16;
  data_ = pages_end_ - bytes;
  data_ -= (reinterpret_cast<uintptr_t>(data_) - misalignment) % 16;
}

// Calls function(offset from the first element, in elements) for all of them, in memory order if
// there are no gaps.
template <typename Function>
void DeviceBuffer::for_each_element(Function&& function) const {
  if (is_dense_) {
    for (int64_t offset = 0; offset < span_; ++offset) function(offset);
    return;
  }
  int64_t index[kMaxDims] = {};
  int64_t offset = 0;
  for (int64_t count = 0; count < num_elements_; ++count) {
    function(offset);
    for (size_t dim = shape_.size(); dim-- > 0;) {
      offset += strides_[dim];
      if (++index[dim] < shape_[dim]) break;
      offset -= strides_[dim] * shape_[dim];
      index[dim] = 0;
    }
  }
}

void DeviceBuffer::copy_in() {
  const auto bytes = static_cast<size_t>(span_ * element_size_);
  fill_canary(pages_begin_, is_dense_ ? data_ : pages_end_);
  fill_canary(data_ + bytes, pages_end_);
  const bool is_read = role_ == Role::kInput || role_ == Role::kInputOutput;
  if (is_read && is_dense_) {
    std::memcpy(data_, host_, bytes);
    return;
  }
  for_each_element([&](int64_t offset) {
    const uint64_t poison = poison_of(element_size_, offset);  // little-endian: its first bytes
    const void* source =
        is_read ? static_cast<const void*>(host_ + offset * element_size_) : &poison;
    copy_element(data_ + offset * element_size_, source, element_size_);
  });
}

void DeviceBuffer::copy_back() {
  if (is_dense_) {
    std::memcpy(host_, data_, static_cast<size_t>(span_ * element_size_));
    return;
  }
  for_each_element([&](int64_t offset) {
    copy_element(host_ + offset * element_size_, data_ + offset * element_size_, element_size_);
  });
}

void DeviceBuffer::check_all_written() const {
  const int64_t needed = element_size_ == 1 ? std::min<int64_t>(kBytesInARow, num_elements_) : 1;
  int64_t in_a_row = 0, first_of_row = 0, first = -1, count = 0;
  for_each_element([&](int64_t offset) {
    uint64_t value = 0;
    copy_element(&value, data_ + offset * element_size_, element_size_);
    if (value != poison_of(element_size_, offset)) {
      in_a_row = 0;
      return;
    }
    if (in_a_row++ == 0) first_of_row = offset;
    if (in_a_row == needed && first < 0) first = first_of_row;
    if (in_a_row >= needed) count += in_a_row == needed ? needed : 1;
  });
  if (first < 0) return;
  add_report("output argument " + name_ + ": element " + element_text(first) +
             " was never written (" + std::to_string(count) + " of " +
             std::to_string(num_elements_) + " elements)");
}

// "[i, j, k]" of the element at `offset` elements from the first.
std::string DeviceBuffer::element_text(int64_t offset) const {
  std::vector<size_t> order(shape_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return strides_[a] > strides_[b]; });
  std::vector<int64_t> index(shape_.size(), 0);
  int64_t rest = offset;
  for (const size_t dim : order) {
    if (strides_[dim] == 0 || shape_[dim] == 1) continue;
    index[dim] = std::min(rest / strides_[dim], shape_[dim] - 1);
    rest -= index[dim] * strides_[dim];
  }
  if (rest != 0)
    return "(none: in the gap between elements, offset " + std::to_string(offset) + ")";
  std::string text = "[";
  for (size_t dim = 0; dim < index.size(); ++dim)
    text += (dim == 0 ? "" : ", ") + std::to_string(index[dim]);
  return text + "]";
}

void DeviceBuffer::check_canaries(const std::string& kernel) {
  if (role_ == Role::kInput) return;  // mapped read-only
  char* const end = data_ + span_ * element_size_;
  if (const char* damage = find_damage(pages_begin_, data_)) {
    add_report(kernel + ": out-of-bounds write " + std::to_string(data_ - damage) +
               " bytes before the start of argument " + name_);
    fill_canary(pages_begin_, data_);
  }
  if (const char* damage = find_damage(end, pages_end_)) {
    add_report(kernel + ": out-of-bounds write " + std::to_string(damage - end) +
               " bytes past the end of argument " + name_);
    fill_canary(end, pages_end_);
  }
  if (!is_dense_) check_gaps(kernel);
}

void DeviceBuffer::check_gaps(const std::string& kernel) {
  std::vector<bool> is_element(static_cast<size_t>(span_), false);
  for_each_element([&](int64_t offset) { is_element[static_cast<size_t>(offset)] = true; });
  for (int64_t offset = 0; offset < span_; ++offset) {
    if (is_element[static_cast<size_t>(offset)]) continue;
    char* gap = data_ + offset * element_size_;
    if (find_damage(gap, gap + element_size_) == nullptr) continue;
    add_report(kernel + ": write between the elements of strided argument " + name_ + ", " +
               std::to_string(offset) + " elements after its first");
    fill_canary(gap, gap + element_size_);
    return;
  }
}

bool DeviceBuffer::covers(const char* address) const {
  return address >= mapping_ && address < mapping_ + mapping_bytes_;
}

std::string DeviceBuffer::describe(const char* address, bool is_write) const {
  const char* end = data_ + span_ * element_size_;
  if (address >= data_ && address < end) {
    return "write to the input argument " + name_ + ", element " +
           element_text((address - data_) / element_size_);
  }
  const bool past = address >= end;
  std::string shape;
  for (const int64_t extent : shape_) shape += (shape.empty() ? "" : ", ") + std::to_string(extent);
  return std::string("out-of-bounds ") + (is_write ? "write " : "read ") +
         std::to_string(past ? address - end : data_ - address) + " bytes " +
         (past ? "past the end" : "before the start") + " of argument " + name_ + " with shape [" +
         shape + "] and " + std::to_string(element_size_) + "-byte elements";
}

bool DeviceBuffer::is_writable(const char* begin, const char* end) const {
  return role_ != Role::kInput && begin >= data_ && end <= data_ + span_ * element_size_;
}

void check_device_buffers(const std::string& kernel) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  for (DeviceBuffer* buffer : registry().buffers) buffer->check_canaries(kernel);
}

std::string describe_device_address(const char* address, bool is_write) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  for (const DeviceBuffer* buffer : registry().buffers) {
    if (buffer->covers(address)) return buffer->describe(address, is_write);
  }
  return "";
}

}  // namespace vtok::emulation

cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t /*stream*/) {
  using vtok::emulation::registry;
  if (bytes == 0) return cudaSuccess;
  const char* begin = static_cast<const char*>(destination);
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    for (const auto* buffer : registry().buffers) {
      if (buffer->covers(begin) && !buffer->is_writable(begin, begin + bytes)) {
        throw std::runtime_error(
            "cudaMemsetAsync: " + std::to_string(bytes) +
            " bytes leave their buffer: " + buffer->describe(begin + bytes - 1, true));
      }
    }
  }
  std::memset(destination, value, bytes);
  return cudaSuccess;
}
