#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// One sequence of the step.
struct SequenceStep {
  int64_t first_token = 0;  ///< row of its first token in the step
  int64_t num_tokens = 0;
  int64_t first_position = 0;
  const int32_t* block_table = nullptr;
  float scale_log2 = 0;     ///< AttentionScale::softmax * log2(e)
  float rotated_scale = 1;  ///< AttentionScale::rotated
};

/// Tokens of one sequence that fall into one key tile: what one thread appends.
struct AppendUnit {
  int64_t seq = 0;
  int64_t first = 0;  ///< within the sequence's tokens of this step
  int64_t count = 0;
  int64_t key = 0;  ///< index among the rank's keys of the first; -1: another rank has them
};

/// A run of query tokens of one sequence against spans [first_span, end_span) of one KV head.
struct AttentionUnit {
  int64_t seq = 0;
  int64_t kv_head = 0;
  int64_t first = 0;  ///< within the sequence's tokens of this step
  int64_t count = 0;
  int64_t first_span = 0;
  int64_t end_span = 0;
  int64_t partial =
      -1;  ///< where the partial result of a single span goes; -1: the whole row is done
  int64_t cost = 0;
};

/// The partial results of one decoding token under one KV head, to be merged.
struct MergeUnit {
  int64_t seq = 0;
  int64_t kv_head = 0;
  int64_t first_partial = 0;
  int64_t num_spans = 0;
};

/// What the CPU ops read in every layer of a step. All memory is taken at construction.
class CpuStepPlan final : public StepPlan {
 public:
  CpuStepPlan(const StepLimits& limits, const AttentionShape& shape, int num_threads);

  /// Bytes such a plan takes.
  static int64_t bytes(const StepLimits& limits, const AttentionShape& shape, int num_threads);

  /// Takes in a step; input may die afterwards. context: of the cache.
  void plan(const StepInput& input, const ContextShard& context, ThreadPool& pool);

  const AttentionShape& shape() const { return shape_; }
  const ContextShard& context() const { return context_; }
  std::span<const int32_t> token_ids() const { return {memory_.token_ids, size(num_tokens_)}; }
  /// Pairs of a head that rotate, the same in every sequence; at most head_dim / 2.
  int64_t rotary_pairs() const { return rotary_pairs_; }
  /// cos and sin of the angles of the step's token t: [rotary_pairs()].
  const float* cos(int64_t t) const { return memory_.cos + t * rotary_pairs_; }
  const float* sin(int64_t t) const { return memory_.sin + t * rotary_pairs_; }
  /// What the queries of the step's tokens from t on are multiplied by: log-n attention, else 1.
  const float* q_scale(int64_t t) const { return memory_.q_scale + t; }
  const SequenceStep& sequence(int64_t seq) const { return memory_.sequences[seq]; }

  std::span<const AppendUnit> append_units() const { return {memory_.appends, size(num_appends_)}; }
  /// Longest first.
  std::span<const AttentionUnit> attention_units() const {
    return {memory_.units, size(num_units_)};
  }
  std::span<const MergeUnit> merge_units() const { return {memory_.merges, size(num_merges_)}; }

  /// Workspace of attention, reused in every layer: see AttentionTask.
  float* partial(int64_t index) const;
  char* scratch(int thread) const;

 private:
  /// Every array of the plan, laid out one after another from base.
  struct Memory {
    Memory() = default;
    Memory(char* base, const StepLimits& limits, const AttentionShape& shape, int num_threads);

    int32_t* token_ids = nullptr;       // [max_tokens]
    float* cos = nullptr;               // [max_tokens][rotary_pairs]
    float* sin = nullptr;               // [max_tokens][rotary_pairs]
    float* q_scale = nullptr;           // [max_tokens]
    SequenceStep* sequences = nullptr;  // [max_seqs]
    int32_t* block_tables = nullptr;    // [max_seqs][max_blocks_per_seq]
    double* inv_freq = nullptr;         // [max_seqs][head_dim / 2], what `turns` was made from
    double* turns = nullptr;            // [max_seqs][head_dim / 2][kTurns][cos, sin]
    AppendUnit* appends = nullptr;
    AttentionUnit* units = nullptr;
    MergeUnit* merges = nullptr;  // [max_seqs x num_kv_heads]
    float* partials = nullptr;    // [partial slots][partial_floats]
    char* scratch = nullptr;      // [num_threads][attention_scratch_bytes]
    int64_t bytes = 0;
  };

  static size_t size(int64_t count) { return static_cast<size_t>(count); }
  void plan_sequences(const StepInput& input);
  void plan_angles(const StepInput& input, ThreadPool& pool);
  void plan_query_scales(const StepInput& input);
  void plan_appends();
  void plan_attention(int num_threads);
  void add_prefill(int64_t seq, int64_t unit_tokens);
  void add_decode(int64_t seq);

  StepLimits limits_;
  AttentionShape shape_;
  Buffer buffer_;
  Memory memory_;
  ContextShard context_;
  int64_t rotary_pairs_ = 0;
  int64_t num_tokens_ = 0;
  int64_t num_seqs_ = 0;
  int64_t num_appends_ = 0;
  int64_t num_units_ = 0;
  int64_t num_merges_ = 0;
  int64_t num_partials_ = 0;
};

}  // namespace longspan::cpu
