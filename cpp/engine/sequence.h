#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/logit_edits.h"
#include "engine/request_state.h"
#include "kv/block_table.h"

namespace longspan {

/// A request on the engine's side: its tokens and how far the model has come with them.
struct Sequence {
  explicit Sequence(std::shared_ptr<RequestState> request_state)
      : state(std::move(request_state)), tokens(state->request.input_ids) {}

  std::shared_ptr<RequestState> state;
  /// Prompt, then generated, of which the last num_awaited are on the device and stand here as
  /// StepInput::token_ids names them.
  std::vector<int32_t> tokens;
  int64_t num_awaited = 0;
  int64_t num_computed = 0;          ///< tokens whose keys and values are in the cache
  int64_t num_published = 0;         ///< leading blocks that are in the prefix cache
  std::optional<BlockTable> blocks;  ///< from admission on
  std::optional<LogitEdits> edits;   ///< from the first token on, where there are any

  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  int64_t rest_of_prefill() const { return state->lengths.prompt - num_computed; }  ///< tokens
  bool in_prefill() const { return rest_of_prefill() > 0; }
  bool awaits_token() const { return num_awaited > 0; }
  /// Of num_computed, those of steps that are done: each one under way has computed one.
  int64_t num_settled() const { return num_computed - num_awaited; }
  /// Whether another token may follow, as far as is known.
  bool goes_on() const { return !state->ended() && num_tokens() < state->lengths.total(); }
};

}  // namespace longspan
