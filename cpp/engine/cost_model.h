#pragma once

#include <cstdint>
#include <string>

#include "backend/backend.h"
#include "checkpoint/model_config.h"
#include "engine/cost_terms.h"
#include "longspan/config.h"
#include "longspan/cost.h"
#include "model/shard.h"

namespace longspan {

/// Seconds from shapes: arithmetic and bytes, each at the rate that was measured. Kernels run one
/// after another and hide nothing of each other, so times add.
class CostModel {
 public:
  /// config: resolved, with the device's defaults; num_sms: of the device.
  CostModel(const ModelConfig& model, const EngineConfig& config, const BackendSizes& backend,
            const DeviceRates& rates, int num_sms, const Cluster& cluster);

  /// Of one prompt, alone, in the steps that the engine would choose.
  CostParts prefill(int64_t tokens) const;
  /// Of a step that gives each of the sequences a token, each behind so many keys.
  CostParts decode(int64_t keys, int64_t sequences) const;
  /// Of an all-reduce of so many bytes among all ranks.
  double all_reduce_seconds(double bytes) const;

 private:
  CostParts chunk(int64_t rows, int64_t position) const;
  double product_seconds(int64_t rows, int64_t out, int64_t in) const;
  double attention_seconds(int64_t rows, int64_t position) const;
  double ranks_seconds(int64_t rows) const;
  double collective_seconds(double bytes, int rounds) const;
  int64_t qkv_features() const;

  const ModelConfig& model_;
  const EngineConfig& config_;
  const DeviceRates& rates_;
  const CommonTerms& terms_ = kCommonTerms;
  const int num_sms_;
  const Cluster cluster_;
  const DeviceTraits traits_;
  const Shard shard_;
  const KvShape kv_;
  const LinearDType linears_;
  const double kv_bytes_;  // of a token and layer on the rank, in the cache's format
  const int64_t least_rows_;
};

}  // namespace longspan
