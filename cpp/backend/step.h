#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "longspan/rope.h"

namespace longspan {

/// The most a step can hold; fixes the size of every buffer of a forward pass.
struct StepLimits {
  int64_t max_tokens = 0;
  int64_t max_seqs = 0;
  int64_t max_blocks_per_seq = 0;
};

/// One forward pass over a batch: tokens of several sequences, each a run of consecutive positions.
/// Built once per step by the engine.
struct StepInput {
  std::vector<int32_t> token_ids;       ///< [num_tokens], sequence after sequence
  std::vector<int64_t> cu_seqlens;      ///< [num_seqs + 1], tokens of sequence s: [s], [s + 1)
  std::vector<int64_t> first_position;  ///< [num_seqs], position of the sequence's first token
                                        ///< here; as many keys are in the cache already
  std::vector<std::vector<int32_t>> block_tables;  ///< [num_seqs][>= blocks used], block ids
  std::vector<std::shared_ptr<const RopeProfile>> profiles;  ///< [num_seqs]

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
  int64_t num_seqs() const { return static_cast<int64_t>(first_position.size()); }
};

/// What a backend derives from a StepInput once and reads in every layer: cos/sin, work lists,
/// workspaces. Owned by the model, reused step after step, sized by StepLimits.
class StepPlan {
 public:
  virtual ~StepPlan() = default;
};

}  // namespace longspan
