#pragma once

#include <array>
#include <string_view>
#include <vector>

#include "backend/kv_cache.h"
#include "longspan/cost.h"

namespace longspan {

/// CostTerm as data.
struct Term {
  std::string_view name;
  double value = 0;
  std::string_view unit;
  std::string_view source;
};

/// What a named device was measured to do.
struct DeviceRates {
  std::string_view device;  ///< as in named_devices.h
  Term product;             ///< FLOP/s of a bfloat16 product of 8192 cubed
  Term copy;                ///< bytes read and written a second
};

/// Null where the device was not measured.
const DeviceRates* find_rates(std::string_view device);
/// Names of those that were, for an error to list.
std::string measured_devices();

/// What holds of every device.
struct CommonTerms {
  Term attention_share;  ///< of DeviceRates::product, in prefill attention
  Term clock_gain;       ///< of the clock where part of a device idles, over its clock at full load
  Term int8_gain;        ///< of prefill_attention="int8" over bfloat16
  Term int8_fp8_gain;    ///< of "int8_fp8"
  Term int8_linear_gain;  ///< of linear_dtype="int8" over bfloat16, in products of a chunk
  Term int8_linear_read;  ///< bytes of codes a second, in products of few rows
  Term kv_read_share;     ///< of DeviceRates::copy, in decode attention
  /// Bytes of keys and values in codes a second, which arithmetic limits: of each format but
  /// kNative, in their order.
  std::array<Term, kKvFormatNames.size() - 1> kv_codes;
  Term layer_seconds;   ///< of a layer's small kernels, whatever the bytes
  Term bus_pair;        ///< all-reduce among two GPUs of a host, NCCL's bus bandwidth
  Term bus;             ///< the same among more
  Term message_share;   ///< of these, which are of 1 GiB, in messages of a chunk
  Term reduce_seconds;  ///< a collective of nothing among GPUs of a host
  Term hop_seconds;     ///< and what each stage between hosts adds
};
extern const CommonTerms kCommonTerms;

/// Those of a device and the common ones.
std::vector<CostTerm> list_terms(const DeviceRates& rates);

}  // namespace longspan
