#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/prefill_tiles.h"

namespace longspan::cuda {

/// Query rows of one thread block of the sm_90a prefill kernel.
constexpr int32_t prefill_rows_sm90(int32_t head_dim) { return head_dim == 64 ? 192 : 128; }

/// The work of each cluster of two thread blocks, in order. A PrefillTile stands for two that share
/// the keys of a KV head: heads `head` and `head + 1` of the same rows where the query heads of a
/// KV head are even in number, else two successive runs of rows of one head. Depends on the step
/// only, not on the layer.
struct PrefillSchedule {
  std::vector<PrefillTile> tiles;
  std::vector<int32_t> first;  ///< [num_clusters + 1]: cluster c has tiles [first[c], first[c + 1])
};

/// Deals out the rows of the sequences, which have at least one each and keys here, so that the
/// clusters of a device with num_sms multiprocessors end at about the same time. Where that allows,
/// rows of one KV head are worked on together: they find its keys in the L2 cache.
PrefillSchedule schedule_prefill_sm90(std::span<const PrefillSeq> seqs, int32_t num_heads,
                                      int32_t num_kv_heads, int32_t head_dim, int32_t num_sms);

/// The most tiles that max_seqs sequences of max_rows rows together can need.
int64_t max_prefill_tiles_sm90(int64_t max_seqs, int64_t max_rows, int32_t num_heads,
                               int32_t num_kv_heads, int32_t head_dim);

/// The clusters that a schedule has work for: its `first` is one longer.
constexpr int32_t prefill_clusters_sm90(int32_t num_sms) { return num_sms < 4 ? 1 : num_sms / 2; }

}  // namespace longspan::cuda
