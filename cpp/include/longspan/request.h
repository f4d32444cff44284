#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "longspan/config.h"
#include "longspan/export.h"
#include "longspan/logprob.h"
#include "longspan/rope.h"

namespace longspan {

enum class RequestKind {
  kGenerate,  ///< continue input_ids
  kScore,     ///< negative log-likelihood of input_ids[1:] given what precedes each
  kLogits,    ///< logits at logit_positions of input_ids
};

/// The user's unit of work.
struct Request {
  RequestKind kind = RequestKind::kGenerate;
  std::vector<int32_t> input_ids;        ///< kGenerate, kLogits: >= 1 ids; kScore: >= 2
  GenerationConfig generation;           ///< kGenerate only
  std::vector<int64_t> logit_positions;  ///< kLogits only: ascending, each in [0, input_ids.size())
  bool token_nll = false;  ///< kScore, kGenerate: also return the likelihood of every prompt token
  std::optional<RopeLength> rope_length;  ///< instead of EngineConfig's
};

enum class FinishReason {
  kNone,         ///< still waiting or running
  kStop,         ///< an end or stop token came
  kLength,       ///< max_new_tokens reached, or a score or logits request is complete
  kContextFull,  ///< session_len, or the length that fixes the RoPE profile, reached
  kCancelled,
};

/// Where a request stands. Safe to read at any time from any thread.
struct Progress {
  int64_t prefill_done = 0;   ///< prompt tokens through the model or cached; counts finished layers
                              ///< of a chunk
  int64_t prefill_total = 0;  ///< prompt tokens
  int64_t generated = 0;      ///< tokens generated so far
  double elapsed_s = 0.0;     ///< since submission
  double tokens_per_s = 0.0;  ///< computed of the prefill, since its first step
  double flops_per_s = 0.0;   ///< arithmetic of those tokens: 2 FLOPs per weight of a layer's
                              ///< linears, 4 head_dim per query head, query and visible key
  double eta_s = -1.0;        ///< seconds to the end of the prefill; < 0: not known yet
};

/// The result of a request.
struct RequestOutput {
  std::vector<int32_t> token_ids;  ///< generated; the token that stopped it is left out
  /// GenerationConfig::logprobs = n: [token_ids.size()][1 + n], the token itself, then the
  /// likeliest ones, likeliest first.
  std::vector<TokenLogprob> logprobs;
  FinishReason finish_reason = FinishReason::kNone;
  std::optional<int32_t> stop_token_id;  ///< kStop: the token that stopped it
  int64_t input_token_len = 0;
  int64_t cached_tokens = 0;  ///< of the prompt, whose keys and values came from the prefix cache
  RopeProfile rope_profile;   ///< the profile every token of the request was rotated with
  uint64_t seed = 0;          ///< what sampling used
  /// kScore, or with Request::token_nll: natural-log units, position i scores input_ids[i + 1];
  /// float64 sum in order of i.
  double nll_sum = 0.0;
  int64_t nll_count = 0;
  std::vector<double> token_nll;  ///< with Request::token_nll: [nll_count], the summands
  std::vector<float> logits;      ///< kLogits: [logit_positions.size()][vocab_size], row-major
  double queue_s = 0.0;           ///< submission to first step
  double prefill_s = 0.0;         ///< first step to the end of the prefill
  double decode_s = 0.0;          ///< end of the prefill to the last token
};

class RequestState;

/// Follows one request. Cheap to copy; all copies mean the same request. Thread-safe.
class LONGSPAN_API RequestHandle {
 public:
  explicit RequestHandle(std::shared_ptr<RequestState> state) : state_(std::move(state)) {}

  /// Waits until the request has finished or the time is over; true when it has finished.
  bool wait_for(std::chrono::milliseconds timeout) const;

  /// Waits for the end and returns the result. Throws what ended the request (NumericalError,
  /// EngineClosed); a cancelled request returns with FinishReason::kCancelled.
  const RequestOutput& wait() const;

  /// Waits until more than `count` tokens are generated, the request has finished or the time is
  /// over; false when it is over.
  bool wait_for_tokens(int64_t count, std::chrono::milliseconds timeout) const;

  /// Generated tokens from index `from` on; returns at once. The way to stream.
  std::vector<int32_t> tokens_from(int64_t from) const;

  /// RequestOutput::logprobs of the tokens from index `from` on; returns at once.
  std::vector<TokenLogprob> logprobs_from(int64_t from) const;

  Progress progress() const;

  /// Asks the engine to stop the request; its KV blocks are free within one layer's time.
  void cancel() const;

 private:
  std::shared_ptr<RequestState> state_;
};

/// Called in the waiting thread, at least every two seconds of wall-clock time.
using ProgressCallback = std::function<void(const Progress&)>;

}  // namespace longspan
