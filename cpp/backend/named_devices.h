#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "backend/backend.h"

namespace longspan {

/// A GPU by the name that people call it, for plans without it.
struct NamedDevice {
  std::string_view name;   ///< "h100"
  std::string_view model;  ///< "NVIDIA H100 80GB HBM3"
  int64_t bytes = 0;       ///< of memory as CUDA counts it, all of it free
  int num_sms = 0;
  int major = 0;  ///< compute capability
  int minor = 0;
};

/// In order of name.
std::span<const NamedDevice> named_devices();

/// Null where there is none of that name.
const NamedDevice* find_named_device(std::string_view name);

/// What memory is planned from on such a device. Throws Unsupported for a dtype other than
/// "auto" and "bfloat16", and BackendUnavailable where this build has no CUDA library.
std::unique_ptr<const BackendSizes> make_sizes(const NamedDevice& device, const std::string& dtype);

}  // namespace longspan
