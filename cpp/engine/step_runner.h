#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <vector>

#include "engine/rank_group.h"
#include "engine/scheduler.h"

namespace longspan {

/// Runs planned steps: forward pass, then what each request wants of it: a token, scores, logits.
class StepRunner {
 public:
  /// runs_behind: decodes may be started before the tokens that they read are known here. closing:
  /// asked between layers whether to give up.
  StepRunner(const ModelConfig& config, RankGroup& ranks, int64_t max_logit_rows, bool runs_behind,
             std::function<bool()> closing);

  /// Starts a step and advances its sequences, whose tokens finish() gives out. False when it was
  /// abandoned half-way for a cancellation or closing; no sequence has moved then.
  bool start(const std::vector<ScheduledSequence>& step);
  /// Whether its sequences may be in another step before the last started one is finished.
  bool can_wait() const { return can_wait_; }
  size_t num_under_way() const { return under_way_.size(); }

  /// Waits for the first step under way, gives out its tokens, finishes the requests that end with
  /// it and returns it. Where waiting fails its requests fail.
  std::vector<ScheduledSequence> finish();
  /// Gives up what is under way.
  void forget() { under_way_.clear(); }

 private:
  /// A row of the step whose logits a request wants.
  struct LogitRow {
    Sequence* sequence;
    int64_t row;
    bool ends_prefill = false;  ///< its token is the first
    int64_t position = 0;       ///< of its token in the sequence
  };

  /// A step whose tokens have been asked for.
  struct UnderWay {
    std::vector<ScheduledSequence> step;
    std::vector<LogitRow> rows;  ///< of which tokens are drawn; those with log probabilities first
    MatrixView logits;           ///< of these rows, until the next step
    int64_t draw = 0;            ///< see Backend::start_sample()
  };

  bool forward(const std::vector<ScheduledSequence>& step);
  void report_layer(const std::vector<ScheduledSequence>& step, int64_t layers_done) const;
  void score(Sequence& sequence, int64_t first_row, int64_t first_position, int64_t count);
  void draw(UnderWay& step);
  void give_out(const UnderWay& step);
  std::vector<TokenLogprob> log_probabilities(const MatrixView& logits,
                                              std::span<const LogitRow> rows,
                                              std::span<const int32_t> tokens) const;
  void copy_logits(const std::vector<LogitRow>& rows);
  void deliver(const LogitRow& row, int32_t token, std::span<const TokenLogprob> logprobs) const;

  const ModelConfig& config_;
  RankGroup& ranks_;
  const int64_t max_logit_rows_;
  const std::function<bool()> closing_;
  const StepCost work_;  // for the share of a prefill's arithmetic that is done
  const bool runs_behind_;
  bool can_wait_ = false;
  std::deque<UnderWay> under_way_;
};

}  // namespace longspan
