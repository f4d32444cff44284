#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/kv_cache.h"
#include "backend/prefill_attention.h"
#include "longspan/rope.h"

namespace longspan {

/// The most a step can hold; fixes the size of every buffer of a forward pass.
struct StepLimits {
  int64_t max_tokens = 0;
  int64_t max_seqs = 0;
  int64_t max_blocks_per_seq = 0;
  int64_t block_len = 256;  ///< of the cache
  KvFormat kv_format = KvFormat::kNative;
  PrefillAttention prefill_attention = PrefillAttention::kNative;

  int64_t max_keys() const { return max_blocks_per_seq * block_len; }  ///< of a sequence
};

/// Stands for a token id that a host need not know yet: that of row `row` of the last
/// Backend::start_sample().
constexpr int32_t drawn_token(int64_t row) { return static_cast<int32_t>(-1 - row); }

/// One forward pass over a batch: tokens of several sequences, each a run of consecutive positions.
/// Built once per step by the engine.
struct StepInput {
  std::vector<int32_t> token_ids;       ///< [num_tokens], sequence after sequence; or drawn_token()
  std::vector<int64_t> cu_seqlens;      ///< [num_seqs + 1], tokens of sequence s: [s], [s + 1)
  std::vector<int64_t> first_position;  ///< [num_seqs], position of the sequence's first token
                                        ///< here; as many keys are in the cache already
  std::vector<std::vector<int32_t>> block_tables;  ///< [num_seqs][>= blocks used], block ids
  std::vector<std::shared_ptr<const RopeProfile>> profiles;  ///< [num_seqs]

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
  int64_t num_seqs() const { return static_cast<int64_t>(first_position.size()); }
};

/// Where the attention factor of a profile enters. It belongs to the dims that rotate: where all
/// do, it is part of the softmax scale; where only some do, their queries carry it. Never the keys.
struct AttentionScale {
  double softmax = 1.0;  ///< of the dot products
  double rotated = 1.0;  ///< of the rotated dims of the query
};

inline AttentionScale attention_scale(const RopeProfile& profile, int64_t head_dim) {
  const double squared = profile.attention_factor * profile.attention_factor;
  const double unit = 1.0 / std::sqrt(static_cast<double>(head_dim));
  const bool whole = 2 * static_cast<int64_t>(profile.inv_freq.size()) == head_dim;
  return whole ? AttentionScale{squared * unit, 1.0} : AttentionScale{unit, squared};
}

/// What log-n attention (RopeProfile::logn_length) multiplies the query of the n-th token by, n
/// counted from 1; exactly 1 within that length, and where there is none.
inline float query_scale(const RopeProfile& profile, int64_t n) {
  if (profile.logn_length == 0 || n <= profile.logn_length) return 1.0f;
  const double unit = std::log(static_cast<double>(profile.logn_length));
  return static_cast<float>(std::log(static_cast<double>(n)) / unit);
}

/// What a backend derives from a StepInput once and reads in every layer: cos/sin, work lists,
/// workspaces. Owned by the model, reused step after step, sized by StepLimits.
class StepPlan {
 public:
  virtual ~StepPlan() = default;
};

}  // namespace longspan
