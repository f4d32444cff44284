#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/context_shard.h"

namespace longspan::cuda {

/// Rows of a PrefillTile; the last of a sequence may have fewer.
inline constexpr int kPrefillRows = 128;

/// Rows of one sequence and one query head: the unit of work of the prefill kernels.
struct PrefillTile {
  int32_t seq = 0;
  int32_t head = 0;
  int32_t row = 0;  ///< first row, counted within the sequence's rows of this step
};

/// A sequence that prefills in this step.
struct PrefillSeq {
  int32_t seq = 0;  ///< index in PlanView::seqs
  int32_t num_rows = 0;
  int64_t first_position = 0;
  ContextShard context = {};

  /// Keys that are here for its first `rows` rows.
  int64_t keys(int64_t rows) const { return context.keys(first_position + rows); }
};

/// Appends the tiles of a step's sequences that have keys here: those of most keys first, so that
/// the short ones fill the end; the heads of a run of rows follow each other, so that those of one
/// KV head find its keys in the L2 cache.
void append_prefill_tiles(std::span<const PrefillSeq> seqs, int32_t num_heads,
                          std::vector<PrefillTile>* tiles);

}  // namespace longspan::cuda
