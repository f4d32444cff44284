#pragma once

#include "model/architecture.h"
#include "parallel/communicator.h"
#include "parallel/share.h"

namespace longspan {

/// What one of tp_size ranks has of a model. cp_size ranks next to each other, which divide
/// tp_size, have the same heads and share the keys of every sequence. Query and KV heads are split
/// over the groups of them; where there are more groups than KV heads, several have the same one.
struct Shard {
  Share q_heads;
  Share kv_heads;
  Share inner;   ///< of intermediate_size
  Share tokens;  ///< of the vocabulary: rows of the embedding and of the head
  bool first = true;
  int tp_rank = 0;
  int tp_size = 1;
  int context_rank = 0;  ///< among those with the same heads
  int context_size = 1;

  Shard(const ModelConfig& config, int tp_rank, int tp_size, int cp_size = 1);
  /// The rank that has the most.
  static Shard largest(const ModelConfig& config, int tp_size, int cp_size = 1) {
    return {config, tp_size - 1, tp_size, cp_size};
  }
};

/// The sizes of a group that can run the model with cp_size context shards, ascending, up to
/// kMaxTp.
inline constexpr int kMaxTp = 512;
std::vector<int> possible_tp(const ModelConfig& config, int cp_size = 1);
/// The numbers of context shards with which a group of tp_size ranks can run the model, ascending.
std::vector<int> possible_cp(const ModelConfig& config, int tp_size);

/// Rows [begin, end) of the stacked parts; a bias is cut alike.
LinearTensors slice_rows(const LinearTensors& tensors, Share rows);
/// Columns [begin, end) of every part. A bias stays with the first rank, since the ranks' outputs
/// add.
LinearTensors slice_cols(const LinearTensors& tensors, Share cols, bool keep_bias);

/// A rank's slices of a layer's tensors and of those around the layers.
LayerTensors slice(const LayerTensors& layer, const ModelConfig& config, const Shard& shard);
OuterTensors slice(const OuterTensors& outer, const Shard& shard);

}  // namespace longspan
