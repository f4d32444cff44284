#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/rank_group.h"
#include "engine/scheduler.h"

namespace longspan {

/// Runs planned steps: forward pass, then what each request wants of it: a token, scores, logits.
class StepRunner {
 public:
  /// eos_token_ids: the model's end tokens. closing: asked between layers whether to give up.
  StepRunner(const ModelConfig& config, RankGroup& ranks, int64_t max_logit_rows,
             std::function<bool()> closing);

  /// Runs one step, advances its sequences and finishes the requests that end with it. False when
  /// it was abandoned half-way for a cancellation or closing; no sequence has moved then.
  bool run(const std::vector<ScheduledSequence>& step);

 private:
  /// A row of the step whose logits a request wants.
  struct LogitRow {
    Sequence* sequence;
    int64_t row;
    bool ends_prefill = false;  ///< its token is the first
  };

  bool forward(const std::vector<ScheduledSequence>& step);
  void report_layer(const std::vector<ScheduledSequence>& step, int64_t layers_done) const;
  void score(Sequence& sequence, int64_t first_row, int64_t first_position, int64_t count);
  void sample(std::vector<LogitRow> rows);
  std::vector<TokenLogprob> log_probabilities(const MatrixView& logits,
                                              std::span<const LogitRow> rows,
                                              std::span<const int32_t> tokens) const;
  void copy_logits(const std::vector<LogitRow>& rows);
  void deliver(Sequence& sequence, int32_t token, std::span<const TokenLogprob> logprobs) const;

  const ModelConfig& config_;
  RankGroup& ranks_;
  const int64_t max_logit_rows_;
  const std::function<bool()> closing_;
  const StepCost work_;  // for the share of a prefill's arithmetic that is done
};

}  // namespace longspan
