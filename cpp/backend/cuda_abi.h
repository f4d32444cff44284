#pragma once

#include <string>

#include "backend/backend.h"

namespace longspan {

/// What a plan must know of a GPU that is not there.
struct CudaDevice {
  std::string name;
  int num_sms = 0;
  int major = 0;  ///< compute capability
  int minor = 0;
};

/// What liblongspan_cuda.so offers, found by dlsym(longspan_cuda_library). The library is built
/// together with liblongspan; `version` keeps a stale one from being called.
struct CudaLibrary {
  static constexpr int kVersion = 2;

  int version = kVersion;
  /// Number of devices that can run it. Where 0, *why is a sentence that says what is missing.
  int (*num_devices)(std::string* why);
  /// Such as "NVIDIA H100 80GB HBM3, 79 GiB, sm_90".
  std::string (*describe)(int device);
  /// The backend of a device in [0, num_devices). Throws BackendUnavailable or Unsupported.
  Backend* (*create)(int device, DType dtype);
  /// What such a device needs memory for; needs no driver.
  BackendSizes* (*sizes)(const CudaDevice& device);
};

}  // namespace longspan

extern "C" const longspan::CudaLibrary* longspan_cuda_library();
