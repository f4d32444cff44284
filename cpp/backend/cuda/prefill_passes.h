#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/prefill_tiles.h"

namespace longspan::cuda {

/// Prefills of a step that the kernels take on together, and over how many KV heads at once. Where
/// the cache is quantised, the kernels read copies of those heads' keys and values in bfloat16,
/// which a workspace has room for.
struct PrefillPass {
  int32_t first_seq = 0;  ///< of the step's prefills
  int32_t num_seqs = 0;
  int32_t num_panels = 0;    ///< that the keys of one head fill
  int32_t num_kv_heads = 0;  ///< divides those of the model
};

/// Panels of kPanelTokens tokens that hold so many keys.
constexpr int64_t panels_of(int64_t num_keys) { return (num_keys + 63) / 64; }

/// Panels of the workspace, each of one KV head: as many as the longest sequence needs for one;
/// more where that is little, up to 4096 (128 MiB at a head_dim of 128), so that a kernel has
/// enough to do at once.
int64_t workspace_panels(int64_t max_keys, int64_t max_seqs, int64_t num_kv_heads);

/// The passes that all sequences take, in their order. capacity: of the workspace, in panels; at
/// least what the longest sequence needs, or 0: the cache is read as it is, in one pass.
std::vector<PrefillPass> plan_prefill_passes(std::span<const PrefillSeq> seqs, int32_t num_kv_heads,
                                             int64_t capacity);

/// The rows of a long sequence that occupy all multiprocessors once in each of its passes, a tile
/// of one head each. has_workspace: these passes take on one KV head at a time.
int64_t rows_of_a_round(bool has_workspace, int64_t num_heads, int64_t num_kv_heads,
                        int64_t num_sms);

}  // namespace longspan::cuda
