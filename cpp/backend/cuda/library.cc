#include <cuda_runtime_api.h>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda_abi.h"
#include "core/check.h"

// The one function that liblongspan calls by name.

namespace longspan::cuda {
namespace {

constexpr int kOldestMajor = 8;  // Ampere: bfloat16 products and cp.async

int num_devices(std::string* why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    *why = message("the NVIDIA driver is too old (it knows CUDA ", driver / 1000, ".",
                   driver % 1000 / 10, ", this build needs ", CUDART_VERSION / 1000, ".",
                   CUDART_VERSION % 1000 / 10, "); update the driver");
    return 0;
  }
  if (status != cudaSuccess || count == 0) {
    *why = message("no GPU was found (", cudaGetErrorString(status), "); device=\"cpu\" works");
    return 0;
  }
  for (int i = 0; i < count; ++i) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    if (major < kOldestMajor) {
      *why = message("GPU ", i, " has compute capability ", major,
                     ".x, expected 8.0 or later (Ampere); hide it with CUDA_VISIBLE_DEVICES");
      return 0;
    }
  }
  return count;
}

std::string describe(int device) {
  const DeviceFacts facts = read_device_facts(device);
  return message(facts.name, ", ", facts.total_bytes >> 30, " GiB, sm_", facts.major, facts.minor);
}

Backend* create(int device, DType dtype) {
  require<Unsupported>(dtype == DType::kBF16, "dtype: expected \"bfloat16\" on CUDA, got \"",
                       name_of(dtype), "\"");
  return new CudaBackend(device);
}

BackendSizes* sizes(const CudaDevice& device) {
  DeviceFacts facts;
  facts.name = device.name;
  facts.num_sms = device.num_sms;
  facts.major = device.major;
  facts.minor = device.minor;
  return new CudaSizes<BackendSizes>(std::move(facts));
}

constexpr CudaLibrary kLibrary = {CudaLibrary::kVersion, num_devices, describe, create, sizes};

}  // namespace
}  // namespace longspan::cuda

extern "C" __attribute__((visibility("default"))) const longspan::CudaLibrary*
longspan_cuda_library() {
  return &longspan::cuda::kLibrary;
}
