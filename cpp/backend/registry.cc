#include "backend/registry.h"

#include "backend/cpu/cpu_backend.h"
#include "core/check.h"
#include "longspan/backends.h"

namespace longspan {
namespace {

constexpr const char* kNoCuda = "this version has no CUDA backend; device=\"cpu\" works";
constexpr int kMaxThreads = 1024;

DType parse_dtype(const std::string& dtype, bool fast_bf16) {
  if (dtype == "float32") return DType::kF32;
  if (dtype == "bfloat16") return DType::kBF16;
  if (dtype == "auto") return fast_bf16 ? DType::kBF16 : DType::kF32;
  require<Unsupported>(dtype != "float16",
                       "dtype: expected \"bfloat16\" or \"float32\" on a CPU, got \"float16\"");
  throw InvalidArgument(
      message("dtype: expected \"auto\", \"bfloat16\" or \"float32\", got \"", dtype, "\""));
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, const std::string& dtype,
                                      int num_threads) {
  require<BackendUnavailable>(!device.starts_with("cuda"), "device: got \"", device, "\", but ",
                              kNoCuda);
  require<InvalidArgument>(device == "auto" || device == "cpu",
                           "device: expected \"auto\" or \"cpu\", got \"", device, "\"");
  require<InvalidArgument>(num_threads >= 0 && num_threads <= kMaxThreads,
                           "num_threads: expected an integer in [0, ", kMaxThreads, "], got ",
                           num_threads);
  const cpu::InstructionSet& set = cpu::choose_instruction_set();
  return std::make_unique<cpu::CpuBackend>(set, parse_dtype(dtype, set.fast_bf16),
                                           num_threads == 0 ? available_cpus() : num_threads);
}

std::vector<BackendInfo> backends() {
  std::string sets;
  for (const cpu::InstructionSet* set : cpu::available_instruction_sets()) {
    sets += (sets.empty() ? "" : ", ") + std::string(set->name);
  }
  return {{"cpu", true, message(sets, "; ", available_cpus(), " CPUs")}, {"cuda", false, kNoCuda}};
}

const char* version() { return LONGSPAN_VERSION; }

}  // namespace longspan
