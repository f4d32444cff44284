#pragma once

#include "model/architecture.h"
#include "parallel/communicator.h"
#include "parallel/share.h"

namespace longspan {

/// What one of tp_size ranks has of a model. Query and KV heads are split; where there are more
/// ranks than KV heads, several have the same one.
struct Shard {
  Share q_heads;
  Share kv_heads;
  Share inner;   ///< of intermediate_size
  Share tokens;  ///< of the vocabulary: rows of the embedding and of the head
  bool first = true;

  Shard(const ModelConfig& config, int tp_rank, int tp_size);
  Shard(const ModelConfig& config, const Communicator& communicator)
      : Shard(config, communicator.rank(), communicator.size()) {}
  /// The rank that has the most.
  static Shard largest(const ModelConfig& config, int tp_size) {
    return {config, tp_size - 1, tp_size};
  }
};

/// The sizes of a tensor-parallel group that can run the model, ascending, up to kMaxTp.
inline constexpr int kMaxTp = 64;
std::vector<int> possible_tp(const ModelConfig& config);

/// Rows [begin, end) of the stacked parts; a bias is cut alike.
LinearTensors slice_rows(const LinearTensors& tensors, Share rows);
/// Columns [begin, end) of every part. A bias stays with the first rank, since the ranks' outputs
/// add.
LinearTensors slice_cols(const LinearTensors& tensors, Share cols, bool keep_bias);

/// A rank's slices of a layer's tensors and of those around the layers.
LayerTensors slice(const LayerTensors& layer, const ModelConfig& config, const Shard& shard);
OuterTensors slice(const OuterTensors& outer, const Shard& shard);

}  // namespace longspan
