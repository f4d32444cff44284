#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "backend/sampler.h"
#include "longspan/request.h"

namespace longspan {

/// What penalties, bans and a least length do to the logits of one sequence, kept up token by token
/// so that a step costs what has changed and not the length of the sequence.
class LogitEdits {
 public:
  /// Whether a config ever edits a logit.
  static bool needed(const GenerationConfig& config);

  /// input_ids: the prompt; eos_token_ids: the model's end tokens.
  LogitEdits(const GenerationConfig& config, std::span<const int32_t> input_ids,
             std::span<const int32_t> eos_token_ids);

  /// The edits for the token that follows `tokens`: the prompt and what was generated since the
  /// last call and before. Valid until the next call.
  std::span<LogitEdit> next(std::span<const int32_t> tokens);

 private:
  size_t index_of(int32_t token);
  void count(int32_t token);
  void refresh(size_t index);
  void ban(int32_t token);

  const GenerationConfig& config_;
  const int64_t prompt_;                       // tokens
  int64_t seen_;                               // tokens counted
  std::vector<int32_t> ends_;                  // what may not come before min_new_tokens
  std::vector<LogitEdit> edits_;               // one per token that was ever edited
  std::vector<int64_t> generated_;             // [edits_.size()], times the token was generated
  std::vector<size_t> banned_;                 // edits that ban for the coming token alone
  std::unordered_map<int32_t, size_t> index_;  // token -> place in edits_
};

}  // namespace longspan
