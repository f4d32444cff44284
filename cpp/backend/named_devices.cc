#include "backend/named_devices.h"

#include <algorithm>
#include <array>

#include "backend/cuda_loader.h"
#include "core/check.h"

namespace longspan {
namespace {

constexpr int64_t mib(int64_t count) { return count << 20; }

// Multiprocessors and compute capabilities are NVIDIA's published ones. Bytes are the least known
// to be reported as such a card's total by CUDA, by way of PyTorch: a card may have a little more.
constexpr std::array kDevices = {
    NamedDevice{"a100-40g", "NVIDIA A100 40GB", mib(40326), 108, 8, 0},
    NamedDevice{"a100-80g", "NVIDIA A100 80GB", mib(81050), 108, 8, 0},
    NamedDevice{"h100", "NVIDIA H100 80GB HBM3", mib(81008), 132, 9, 0},
    NamedDevice{"h200", "NVIDIA H200", mib(143073), 132, 9, 0},
    NamedDevice{"l40s", "NVIDIA L40S", mib(45466), 142, 8, 9},
    NamedDevice{"rtx4090", "NVIDIA GeForce RTX 4090", mib(24084), 128, 8, 9},
};

}  // namespace

std::span<const NamedDevice> named_devices() { return kDevices; }

const NamedDevice* find_named_device(std::string_view name) {
  const auto found = std::ranges::find(kDevices, name, &NamedDevice::name);
  return found == kDevices.end() ? nullptr : &*found;
}

std::unique_ptr<const BackendSizes> make_sizes(const NamedDevice& device,
                                               const std::string& dtype) {
  require<Unsupported>(dtype == "auto" || dtype == "bfloat16", "dtype: expected \"bfloat16\" on ",
                       device.name, ", got \"", dtype, "\"");
  std::string why;
  const CudaLibrary* library = open_cuda_library(&why);
  if (library == nullptr) {
    throw BackendUnavailable(message("device: got \"", device.name, "\", but ", why));
  }
  const CudaDevice facts{std::string(device.model), device.num_sms, device.major, device.minor};
  return std::unique_ptr<const BackendSizes>(library->sizes(facts));
}

}  // namespace longspan
