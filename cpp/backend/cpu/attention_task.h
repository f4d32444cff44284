#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/context_shard.h"
#include "backend/cpu/kv_tiles.h"

namespace longspan::cpu {

/// Keys of one span. Online softmax runs within a span, which starts at a multiple of kSpanKeys;
/// the spans of a row are merged in ascending order whoever computed them, so that splitting a
/// row's keys over threads never changes a bit.
inline constexpr int64_t kSpanKeys = 1024;

/// Keys of one step of the online softmax, at multiples of kStepKeys.
inline constexpr int64_t kStepKeys = 2 * kKeyTile;

/// Partial sums that the sum of a row's weights is held in within a span.
inline constexpr int64_t kSumLanes = 16;

/// Query rows whose scores of a step are held at once.
inline constexpr int64_t kStripRows = 32;

/// Query rows (tokens x heads of one KV head) that share one pass over the keys, at most.
inline constexpr int64_t kMaxUnitRows = 256;

/// Rows of the largest unit, a multiple of kStripRows.
constexpr int64_t unit_rows(int64_t group) {
  return std::max(kMaxUnitRows, round_up(group, kStripRows));
}

/// Columns of a row of O: head_dim padded to whole panels.
constexpr int64_t output_cols(int64_t head_dim) { return round_up(head_dim, kPanelCols); }

/// A run of query tokens of one sequence under one KV head, against spans [first_span, end_span).
/// Row r of the unit is head r % group of token r / group.
struct AttentionTask {
  int64_t group = 0;
  int64_t head_dim = 0;
  int64_t num_tokens = 0;
  int64_t first_position = 0;
  ContextShard context;  ///< the keys that are here: spans and tiles are of these
  int64_t first_span = 0;
  int64_t end_span = 0;
  float scale_log2 = 0;  ///< attention_factor^2 / sqrt(head_dim) * log2(e)

  const KvTiles* tiles = nullptr;
  const char* pool = nullptr;
  const int32_t* block_table = nullptr;
  int64_t layer = 0;
  int64_t kv_head = 0;

  const void* q = nullptr;  ///< act [num_tokens][group * head_dim], tokens q_stride elements apart
  int64_t q_stride = 0;
  void* out = nullptr;  ///< act, as q; unless partial is set
  int64_t out_stride = 0;
  float* log_sum_exp = nullptr;  ///< [num_tokens][group], natural log; null, or as out
  int64_t log_sum_exp_stride = 0;
  float* partial = nullptr;  ///< of one span: O [group][output_cols], then m [group], l [group]
  char* scratch = nullptr;   ///< attention_scratch_bytes

  int64_t rows() const { return num_tokens * group; }
  /// Keys that the row sees.
  int64_t visible(int64_t row) const { return context.keys(first_position + row / group + 1); }
};

/// The partial results of one token under one KV head, span after span, to be merged.
struct MergeTask {
  int64_t group = 0;
  int64_t head_dim = 0;
  int64_t num_spans = 0;
  const float* partials = nullptr;  ///< [num_spans][partial_floats]
  void* out = nullptr;              ///< act [group * head_dim]
  float* log_sum_exp = nullptr;     ///< [group] or null
  char* scratch = nullptr;          ///< attention_scratch_bytes
};

/// Floats of the partial result of one token under one KV head.
constexpr int64_t partial_floats(int64_t group, int64_t head_dim) {
  return round_up(group * (output_cols(head_dim) + 2), 16);
}

/// Bytes of working memory of one attention unit; float32 needs the most.
constexpr int64_t attention_scratch_bytes(int64_t group, int64_t head_dim) {
  const int64_t rows = unit_rows(group);
  const int64_t queries = rows * padded_k<bf16_t>(head_dim);
  const int64_t outputs = 2 * rows * output_cols(head_dim);  // of the span, of the spans so far
  const int64_t row_state = rows * (kSumLanes + 4);          // l by lane, l, m; l and m so far
  const int64_t strip = 2 * kStripRows * kStepKeys;          // S, P
  const int64_t decoded =                                    // keys, values and scales of a step
      kStepKeys * (padded_k<bf16_t>(head_dim) + output_cols(head_dim) + 1);
  return 4 * (queries + outputs + row_state + strip + decoded);
}

}  // namespace longspan::cpu
