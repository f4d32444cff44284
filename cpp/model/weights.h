#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "model/linear.h"
#include "model/shard.h"

namespace longspan {

/// One decoder layer on this rank.
struct LayerWeights {
  Buffer input_norm;                        ///< float32 [hidden_size]
  std::optional<ColumnParallelLinear> qkv;  ///< q | k | v
  Buffer q_norm, k_norm;                    ///< float32 [head_dim]; empty unless config.qk_norm
  std::optional<RowParallelLinear> o;
  Buffer post_attention_norm;                   ///< float32 [hidden_size]
  std::optional<ColumnParallelLinear> gate_up;  ///< gate | up
  std::optional<RowParallelLinear> down;
};

/// A decoder's weights on this rank, packed for its backend.
struct DecoderWeights {
  std::unique_ptr<PackedLinear> embedding;  ///< [the rank's tokens, hidden_size]
  std::unique_ptr<PackedLinear> own_head;   ///< null when tied
  Buffer final_norm;                        ///< float32 [hidden_size]
  std::vector<LayerWeights> layers;

  const PackedLinear& head() const { return own_head ? *own_head : *embedding; }
};

/// Called from one loader thread at a time with bytes of the checkpoint read so far and in all.
using WeightProgress = std::function<void(int64_t done, int64_t total)>;

/// Reads, checks and packs a rank's share of a checkpoint with up to num_threads threads, the
/// linears of the layers in a dtype, tables in the backend's own; the rest is not read. Every
/// tensor's presence and shape is checked before the first is packed; pages of the file are
/// released as they are done. Throws CheckpointError for a missing, misshapen, unused or non-finite
/// tensor.
DecoderWeights load_weights(const ModelConfig& config, const Checkpoint& checkpoint,
                            Backend& backend, const Shard& shard, LinearDType dtype,
                            int num_threads, const WeightProgress& progress);

/// Bytes that load_weights will take.
int64_t weight_bytes(const ModelConfig& config, const BackendSizes& backend, const Shard& shard,
                     LinearDType dtype);

/// Parameters of the whole model, a tied head counted once.
int64_t num_parameters(const ModelConfig& config);

}  // namespace longspan
