#pragma once

#include <cstdint>

#include "backend/context_shard.h"

namespace longspan::cuda {

/// A sequence of the step, as kernels see it.
struct SeqView {
  int64_t first_position = 0;  ///< of its first row; as many keys are in the cache already
  int64_t table = 0;           ///< index of its first block in PlanView::block_tables
  int32_t first_row = 0;       ///< row of the step's matrices
  int32_t num_rows = 0;
  int32_t profile = 0;      ///< row of PlanView::inv_freq
  float scale_log2 = 0.0f;  ///< AttentionScale::softmax * log2(e): softmax by exp2
  float rotated = 1.0f;     ///< AttentionScale::rotated
};

/// What kernels read of a step: device memory, filled once per step.
struct PlanView {
  const SeqView* seqs = nullptr;          ///< [num_seqs], in order of first_row
  const int32_t* block_tables = nullptr;  ///< block ids, a sequence's are consecutive
  const int32_t* token_ids = nullptr;     ///< [num_tokens]
  const int32_t* row_seq = nullptr;       ///< [num_tokens], sequence of each row
  const double* inv_freq = nullptr;       ///< [num_profiles][rotary_dim / 2]
  const float* cos_sin = nullptr;         ///< [num_tokens][rotary_dim / 2]{cos, sin}
  int32_t num_seqs = 0;
  int32_t num_tokens = 0;
  int32_t rotary_pairs = 0;  ///< rotary_dim / 2
  ContextShard context;      ///< the keys that are here, to which block tables lead
};

}  // namespace longspan::cuda
