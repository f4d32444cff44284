#include "backend/registry.h"

#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda_loader.h"
#include "core/check.h"
#include "longspan/backends.h"
#include "parallel/share.h"

namespace longspan {
namespace {

constexpr int kMaxThreads = 1024;

DType parse_cpu_dtype(const std::string& dtype, bool fast_bf16) {
  if (dtype == "float32") return DType::kF32;
  if (dtype == "bfloat16") return DType::kBF16;
  if (dtype == "auto") return fast_bf16 ? DType::kBF16 : DType::kF32;
  require<Unsupported>(dtype != "float16",
                       "dtype: expected \"bfloat16\" or \"float32\" on a CPU, got \"float16\"");
  throw InvalidArgument(
      message("dtype: expected \"auto\", \"bfloat16\" or \"float32\", got \"", dtype, "\""));
}

std::unique_ptr<Backend> make_cpu_backend(const std::string& dtype, int num_threads) {
  const cpu::InstructionSet& set = cpu::choose_instruction_set();
  return std::make_unique<cpu::CpuBackend>(set, parse_cpu_dtype(dtype, set.fast_bf16),
                                           num_threads == 0 ? available_cpus() : num_threads);
}

/// The N of "cuda:N", 0 for "cuda".
int parse_cuda_index(const std::string& device) {
  if (device == "cuda") return 0;
  const std::string digits = device.substr(5);
  require<InvalidArgument>(device[4] == ':' && !digits.empty() && digits.size() <= 4 &&
                               digits.find_first_not_of("0123456789") == std::string::npos,
                           "device: expected \"cuda\" or \"cuda:N\" with N >= 0, got \"", device,
                           "\"");
  return std::stoi(digits);
}

std::unique_ptr<Backend> make_cuda_backend(const std::string& device, const std::string& dtype) {
  const int index = parse_cuda_index(device);
  require<InvalidArgument>(
      dtype == "auto" || dtype == "bfloat16" || dtype == "float32" || dtype == "float16",
      "dtype: expected \"auto\" or \"bfloat16\" on CUDA, got \"", dtype, "\"");
  std::string why;
  const CudaLibrary* library = find_cuda_library(&why);
  if (library == nullptr) {
    throw BackendUnavailable(message("device: got \"", device, "\", but ", why));
  }
  require<Unsupported>(dtype == "auto" || dtype == "bfloat16",
                       "dtype: expected \"bfloat16\" on CUDA, got \"", dtype, "\"");
  const int count = library->num_devices(&why);
  require<BackendUnavailable>(index < count, "device: expected cuda:0 to cuda:", count - 1,
                              ", got \"", device, "\"");
  return std::unique_ptr<Backend>(library->create(index, DType::kBF16));
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, const std::string& dtype,
                                      int num_threads) {
  require<InvalidArgument>(num_threads >= 0 && num_threads <= kMaxThreads,
                           "num_threads: expected an integer in [0, ", kMaxThreads, "], got ",
                           num_threads);
  if (device.starts_with("cuda")) return make_cuda_backend(device, dtype);
  require<InvalidArgument>(device == "auto" || device == "cpu",
                           "device: expected \"auto\", \"cpu\", \"cuda\" or \"cuda:N\", got \"",
                           device, "\"");
  std::string why;
  // The GPU computes in bfloat16 only, so what asks for anything else runs on the CPU.
  const bool gpu_dtype = dtype == "auto" || dtype == "bfloat16";
  if (device == "auto" && gpu_dtype && find_cuda_library(&why) != nullptr) {
    return make_cuda_backend("cuda", dtype);
  }
  return make_cpu_backend(dtype, num_threads);
}

std::vector<std::unique_ptr<Backend>> make_backends(const std::string& device,
                                                    const std::string& dtype, int num_threads,
                                                    int count) {
  std::vector<std::unique_ptr<Backend>> all;
  if (count == 1) {
    all.push_back(make_backend(device, dtype, num_threads));
    return all;
  }
  require<InvalidArgument>(device.find(':') == std::string::npos,
                           "device: expected \"auto\", \"cpu\" or \"cuda\" with tp > 1, got \"",
                           device, "\"");
  std::string why;
  const CudaLibrary* cuda = device == "cpu" ? nullptr : find_cuda_library(&why);
  const bool gpu_dtype = dtype == "auto" || dtype == "bfloat16";
  if (device == "cuda" || (device == "auto" && gpu_dtype && cuda != nullptr)) {
    const int gpus = cuda == nullptr ? 0 : cuda->num_devices(&why);
    require<BackendUnavailable>(cuda == nullptr || gpus >= count, "tp: expected at most ", gpus,
                                ", the GPUs there are, got ", count);
    for (int i = 0; i < count; ++i) {
      all.push_back(make_cuda_backend(message("cuda:", i), dtype));
    }
    return all;
  }
  const int threads = num_threads == 0 ? available_cpus() : num_threads;
  for (int i = 0; i < count; ++i) {
    const auto share = static_cast<int>(share_of(threads, i, count).size());
    all.push_back(make_backend(device == "auto" ? "cpu" : device, dtype, std::max(1, share)));
  }
  return all;
}

std::unique_ptr<Backend> make_launched_backend(const std::string& device, const std::string& dtype,
                                               int num_threads, int local_rank) {
  std::string why;
  const bool gpu_dtype = dtype == "auto" || dtype == "bfloat16";
  if (device == "cuda" || (device == "auto" && gpu_dtype)) {
    const CudaLibrary* cuda = find_cuda_library(&why);
    if (cuda != nullptr) {
      return make_cuda_backend(message("cuda:", local_rank % cuda->num_devices(&why)), dtype);
    }
  }
  return make_backend(device, dtype, num_threads);
}

std::vector<BackendInfo> backends() {
  std::string sets;
  for (const cpu::InstructionSet* set : cpu::available_instruction_sets()) {
    sets += (sets.empty() ? "" : ", ") + std::string(set->name);
  }
  std::string detail;
  const CudaLibrary* cuda = find_cuda_library(&detail);
  if (cuda != nullptr) {
    for (int i = 0, n = cuda->num_devices(&detail); i < n; ++i) {
      detail += message(i == 0 ? "" : "; ", "cuda:", i, " ", cuda->describe(i));
    }
  }
  return {{"cpu", true, message(sets, "; ", available_cpus(), " CPUs")},
          {"cuda", cuda != nullptr, detail}};
}

const char* version() { return LONGSPAN_VERSION; }

}  // namespace longspan
