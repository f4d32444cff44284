#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "core/memory.h"

namespace longspan::cuda {

/// Zero-filled memory of the current device. Throws CapacityError.
Buffer allocate_device(int64_t bytes);

/// Page-locked host memory, which copies reach asynchronously. Throws CapacityError.
Buffer allocate_pinned(int64_t bytes);

/// Small inputs on their way to the device, in the order of the stream: a ring of slots of
/// page-locked host memory, and one place in device memory. A slot is filled again only when its
/// last copy has been made, so that nothing here waits for the stream's other work.
class UploadRing {
 public:
  UploadRing(int64_t slot_bytes, int num_slots);
  ~UploadRing();
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;

  int64_t slot_bytes() const { return slot_bytes_; }

  /// Host memory of the next slot, slot_bytes() long, free to be written.
  char* begin();
  /// Queues the copy of the first `bytes` of what begin() gave; returns where they arrive, always
  /// the same place, which holds them until the stream comes to the next upload.
  char* upload(int64_t bytes, cudaStream_t stream);

  /// begin() and upload() of an array of at most slot_bytes().
  template <class T>
  const T* push(std::span<const T> values, cudaStream_t stream) {
    std::copy(values.begin(), values.end(), reinterpret_cast<T*>(begin()));
    return reinterpret_cast<const T*>(upload(static_cast<int64_t>(values.size_bytes()), stream));
  }

 private:
  struct Slot {
    char* host = nullptr;
    cudaEvent_t copied = nullptr;
  };

  int64_t slot_bytes_;
  Buffer host_;
  Buffer device_;
  std::vector<Slot> slots_;
  size_t next_ = 0;
};

}  // namespace longspan::cuda
