#include "backend/cuda/device_memory.h"

#include <algorithm>

#include "backend/cuda/cuda_check.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kAlignment = 1024;

}  // namespace

Buffer allocate_device(int64_t bytes) {
  require<InvalidArgument>(bytes >= 0, "device memory: expected a size >= 0 bytes, got ", bytes);
  if (bytes == 0) return {};
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (status != cudaSuccess) {
    cudaGetLastError();  // a refused allocation leaves nothing broken behind
    size_t free = 0;
    size_t total = 0;
    cudaMemGetInfo(&free, &total);
    throw CapacityError(message("device memory: expected to allocate ", bytes, " bytes, got \"",
                                cudaGetErrorString(status), "\" with ", free, " bytes free"));
  }
  Buffer buffer(data, bytes, [](void* p, int64_t) { cudaFree(p); });
  check_cuda(cudaMemset(data, 0, static_cast<size_t>(bytes)), "clearing memory");
  // The zeros travel on a stream that others do not wait for: who writes here next must come later.
  check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "clearing memory");
  return buffer;
}

Buffer allocate_pinned(int64_t bytes) {
  void* data = nullptr;
  check_cuda(cudaMallocHost(&data, static_cast<size_t>(bytes)), "allocating page-locked memory");
  return {data, bytes, [](void* p, int64_t) { cudaFreeHost(p); }};
}

UploadRing::UploadRing(int64_t slot_bytes, int num_slots)
    : slot_bytes_((slot_bytes + kAlignment - 1) / kAlignment * kAlignment),
      host_(allocate_pinned(slot_bytes_ * num_slots)),
      device_(allocate_device(slot_bytes_)),
      slots_(static_cast<size_t>(num_slots)) {
  int64_t offset = 0;
  for (Slot& slot : slots_) {
    slot.host = host_.as<char>() + offset;
    offset += slot_bytes_;
    check_cuda(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "creating an event");
  }
}

UploadRing::~UploadRing() {
  for (const Slot& slot : slots_) {
    if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
  }
}

char* UploadRing::begin() {
  next_ = (next_ + 1) % slots_.size();
  check_cuda(cudaEventSynchronize(slots_[next_].copied), "waiting for a copy");
  return slots_[next_].host;
}

char* UploadRing::upload(int64_t bytes, cudaStream_t stream) {
  const Slot& slot = slots_[next_];
  require<InvalidArgument>(bytes <= slot_bytes_, "upload: expected at most ", slot_bytes_,
                           " bytes, got ", bytes);
  check_cuda(cudaMemcpyAsync(device_.data(), slot.host, static_cast<size_t>(bytes),
                             cudaMemcpyHostToDevice, stream),
             "copying to the device");
  check_cuda(cudaEventRecord(slot.copied, stream), "recording an event");
  return device_.as<char>();
}

}  // namespace longspan::cuda
