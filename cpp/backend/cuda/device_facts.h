#pragma once

#include <cstdint>
#include <string>

namespace longspan::cuda {

/// What is asked of a device once.
struct DeviceFacts {
  int device = 0;
  int num_sms = 0;
  int major = 0;  ///< compute capability
  int minor = 0;
  int64_t total_bytes = 0;
  std::string name;

  /// Hopper has kernels of its own, which no other card runs.
  bool is_hopper() const { return major == 9 && minor == 0; }
};

/// Throws BackendUnavailable.
DeviceFacts read_device_facts(int device);

}  // namespace longspan::cuda
