#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "engine/lengths.h"
#include "longspan/request.h"
#include "longspan/signal.h"

namespace longspan {

/// What a RequestHandle and the engine thread share. Every method is thread-safe.
class RequestState {
 public:
  RequestState(Request request, const RequestLengths& lengths, RopeProfile profile, uint64_t seed,
               std::shared_ptr<Signal> signal = nullptr, double prefill_flops = 0.0);

  const Request request;
  const RequestLengths lengths;
  const std::shared_ptr<const RopeProfile> profile;
  const uint64_t seed;
  const double prefill_flops;  ///< arithmetic of the whole prompt

  /// Whether every row of the prompt is scored, so that none can be left to the prefix cache.
  bool scores_prompt() const { return request.kind == RequestKind::kScore || request.token_nll; }

  // ---- the engine's side ----

  /// The first step that holds the request begins.
  void start();
  /// Another `tokens` of the prompt need no computing, which is `work` of [0, 1] of the prefill's
  /// arithmetic.
  void skip_prefill(int64_t tokens, double work);
  /// tokens of the prompt are done, which is `work` of [0, 1] of the prefill's arithmetic.
  void set_prefill(int64_t tokens, double work);
  /// logprobs: [1 + GenerationConfig::logprobs], or none.
  void add_token(int32_t id, std::span<const TokenLogprob> logprobs);
  void add_nll(const std::vector<double>& nll);
  void add_logits(const float* row, int64_t count);
  /// Fixes how the request ends, if that has not been fixed yet.
  void finish(FinishReason reason, std::optional<int32_t> stop_token_id = std::nullopt);
  void fail(std::exception_ptr error);
  bool ended() const { return ended_; }
  bool failed();  ///< ended by fail()
  /// Hands the result of an ended request to who waits for it. Called once its blocks are free and
  /// the engine's metrics count what it took.
  void hand_out();
  bool cancelled() const { return cancelled_; }

  // ---- the handle's side; see RequestHandle ----

  bool wait_for(std::chrono::milliseconds timeout);
  bool wait_for_tokens(int64_t count, std::chrono::milliseconds timeout);
  const RequestOutput& wait();
  std::vector<int32_t> tokens_from(int64_t from);
  std::vector<TokenLogprob> logprobs_from(int64_t from);
  Progress progress();
  void cancel() { cancelled_ = true; }

 private:
  using Clock = std::chrono::steady_clock;

  void end_locked();
  void moved();
  bool finished() const { return handed_out_; }

  const std::shared_ptr<Signal> signal_;  // may be null
  const Clock::time_point submitted_ = Clock::now();
  std::atomic<bool> cancelled_ = false;
  std::atomic<bool> ended_ = false;       // written under mutex_
  std::atomic<bool> handed_out_ = false;  // written under mutex_
  std::mutex mutex_;
  std::condition_variable moved_;  // a token or the end has come
  // All below are guarded by mutex_.
  std::exception_ptr error_;
  RequestOutput output_;
  Clock::time_point started_{};    // epoch: not yet
  Clock::time_point prefilled_{};  // epoch: not yet
  Clock::time_point end_{};        // epoch: not yet
  int64_t prefill_done_ = 0;
  double prefill_work_ = 0.0;
  double skipped_work_ = 0.0;  // of prefill_work_
};

}  // namespace longspan
