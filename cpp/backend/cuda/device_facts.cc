#include "backend/cuda/device_facts.h"

#include "backend/cuda/cuda_check.h"

namespace longspan::cuda {

DeviceFacts read_device_facts(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "reading the device's properties");
  return {device,
          properties.multiProcessorCount,
          properties.major,
          properties.minor,
          static_cast<int64_t>(properties.totalGlobalMem),
          properties.name};
}

}  // namespace longspan::cuda
