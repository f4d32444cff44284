#include "engine/cost_terms.h"

#include <algorithm>
#include <string>

namespace longspan {
namespace {

constexpr std::string_view kFlops = "FLOP/s";
constexpr std::string_view kBytes = "B/s";
constexpr std::string_view kSeconds = "s";
constexpr std::string_view kShare = "share";
constexpr std::string_view kDecodeRecord = "benchmarks/results/cuda_decode-nvidia-h200.json";
constexpr std::string_view kInt8Record =
    "128k of benchmarks/results/cuda_attention_int8-nvidia-h200.json";

constexpr Term codes(std::string_view name, double value) {
  return {name, value, kBytes, kDecodeRecord};
}

constexpr std::array kRates = {
    DeviceRates{"h100",
                {"product", 767e12, kFlops,
                 "benchmarks/results/cuda_reference_job-nvidia-h100.json: bf16_product_flops"},
                {"copy", 3.0e12, kBytes,
                 "benchmarks/results/cuda_reference_job-nvidia-h100.json: copy_bytes_per_s"}},
    DeviceRates{"h200",
                {"product", 752e12, kFlops,
                 "benchmarks/results/cuda_scaling-nvidia-h200.json: bf16_product_flops"},
                {"copy", 4.23e12, kBytes,
                 "benchmarks/results/cuda_scaling-nvidia-h200.json: copy_bytes_per_s"}},
};

}  // namespace

const CommonTerms kCommonTerms = {
    .attention_share = {"attention_share", 0.90, kShare,
                        "causal-128k of benchmarks/results/cuda_attention-nvidia-h100.json over "
                        "product"},
    .clock_gain =
        {"clock_gain", 1.24, kShare,
         "NVIDIA's boost clock of an H100, 1980 MHz, over the 1600 MHz under attention of "
         "benchmarks/notes/prefill.md"},
    .int8_gain = {"int8_gain", 1.27, kShare, kInt8Record},
    .int8_fp8_gain = {"int8_fp8_gain", 1.38, kShare, kInt8Record},
    .int8_linear_gain = {"int8_linear_gain", 1.6, kShare,
                         "fitted: prefill_32768_s of "
                         "benchmarks/results/cuda_int8_linear-nvidia-h200.json"},
    .int8_linear_read = {"int8_linear_read", 3.4e12, kBytes,
                         "fitted: decode_at_2048_s of "
                         "benchmarks/results/cuda_int8_linear-nvidia-h200.json"},
    .kv_read_share = {"kv_read_share", 0.97, kShare, kDecodeRecord},
    .kv_codes = {codes("kv_codes int8", 3.69e12), codes("kv_codes fp8", 3.61e12),
                 codes("kv_codes int8_fp8", 3.69e12), codes("kv_codes int8_int4", 3.49e12),
                 codes("kv_codes int4", 2.99e12)},
    .layer_seconds = {"layer_seconds", 15e-6, kSeconds,
                      "fitted: decode at 2048, batch 1 of "
                      "benchmarks/results/cuda_reference_job-nvidia-h100.json"},
    .bus_pair = {"bus_pair", 329e9, kBytes,
                 "benchmarks/results/cuda_scaling-nvidia-h200.json: all-reduce of 1 GiB on two"},
    .bus = {"bus", 355e9, kBytes, "NCCL all-reduce of 1 GiB on four H100, no record kept"},
    .message_share = {"message_share", 0.84, kShare,
                      "benchmarks/results/cuda_scaling-nvidia-h200.json: all-reduce of 69 MB, "
                      "without reduce_seconds"},
    .reduce_seconds = {"reduce_seconds", 15e-6, kSeconds,
                       "assumed: one of 8 KiB takes 38 us through torch, most of it torch's own"},
    .hop_seconds = {"hop_seconds", 5e-6, kSeconds,
                    "assumed: a stage of a tree of InfiniBand links"},
};

const DeviceRates* find_rates(std::string_view device) {
  const auto found = std::ranges::find(kRates, device, &DeviceRates::device);
  return found == kRates.end() ? nullptr : &*found;
}

std::string measured_devices() {
  std::string names;
  for (const DeviceRates& rates : kRates) {
    if (!names.empty()) names += ", ";
    names += '"' + std::string(rates.device) + '"';
  }
  return names;
}

std::vector<CostTerm> list_terms(const DeviceRates& rates) {
  const CommonTerms& c = kCommonTerms;
  std::vector<Term> terms = {rates.product,      rates.copy,         c.attention_share,
                             c.clock_gain,       c.int8_gain,        c.int8_fp8_gain,
                             c.int8_linear_gain, c.int8_linear_read, c.kv_read_share,
                             c.layer_seconds,    c.bus_pair,         c.bus,
                             c.message_share,    c.reduce_seconds,   c.hop_seconds};
  terms.insert(terms.end(), c.kv_codes.begin(), c.kv_codes.end());
  std::vector<CostTerm> list;
  list.reserve(terms.size());
  for (const Term& t : terms) {
    list.push_back({std::string(t.name), t.value, std::string(t.unit), std::string(t.source)});
  }
  return list;
}

}  // namespace longspan
