#pragma once

#include <cstdint>
#include <memory>

namespace longspan {

/// Zero-filled memory owned by whoever holds it; device memory for a device backend.
class Buffer {
 public:
  using Deleter = void (*)(void* data, int64_t bytes);

  Buffer() = default;
  Buffer(void* data, int64_t bytes, Deleter deleter)
      : data_(data, Free{bytes, deleter}), bytes_(bytes) {}

  void* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    int64_t bytes;
    Deleter deleter;
    void operator()(void* data) const { deleter(data, bytes); }
  };
  std::unique_ptr<void, Free> data_;
  int64_t bytes_ = 0;
};

/// Zero-filled host memory aligned to a page, physical pages taken only when touched, huge pages
/// where the system has them. Throws CapacityError when the address space cannot be had.
Buffer allocate_host(int64_t bytes);

/// Bytes of physical memory that could be had now: MemAvailable, less where a cgroup limits it.
int64_t available_host_bytes();

}  // namespace longspan
