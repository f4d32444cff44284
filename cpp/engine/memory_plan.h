#pragma once

#include <cstdint>

#include "checkpoint/model_config.h"
#include "longspan/plan.h"
#include "model/decoder.h"

namespace longspan {

/// Fills in what EngineConfig leaves to the model and checks every field.
/// Throws InvalidArgument or Unsupported, naming the option.
EngineConfig resolve_engine_config(const EngineConfig& config, const ModelConfig& model);

/// Fills in what EngineConfig leaves to the device. Throws Unsupported for what it cannot do.
void take_device_defaults(EngineConfig& config, const ModelConfig& model,
                          const BackendSizes& backend);

/// What the linears of the layers are to be in. Throws InvalidArgument.
LinearDType linear_dtype(const EngineConfig& config);

/// The limits a resolved config sets to a forward pass.
DecoderLimits decoder_limits(const EngineConfig& config, const DeviceTraits& device);

/// What one token block of this model looks like in the cache of a rank.
KvShape kv_shape(const EngineConfig& config, const ModelConfig& model, const Shard& shard);

/// What a chunk of a prompt should have at least (BackendSizes::least_prefill_tokens).
int64_t least_prefill_tokens(const EngineConfig& config, const ModelConfig& model,
                             const BackendSizes& backend);

/// Tokens of a sequence that a block holds, on all ranks that share the context together.
constexpr int64_t tokens_per_block(const EngineConfig& config) {
  return int64_t{config.cache_block_seq_len} * config.cp;
}

/// The plan for device_bytes of free memory; config: resolved.
MemoryPlan make_memory_plan(const EngineConfig& config, const ModelConfig& model,
                            const BackendSizes& backend, int64_t device_bytes);

}  // namespace longspan
