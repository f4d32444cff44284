#pragma once

#include <cstdint>

#include "longspan/config.h"
#include "longspan/request.h"

namespace longspan {

/// What a request's lengths come to, fixed when it is submitted. All in tokens.
struct RequestLengths {
  int64_t prompt = 0;
  int64_t max_new_tokens = 0;  ///< generation stops here
  int64_t rope_length = 0;     ///< the length its RoPE profile is for
  bool clamped = false;        ///< max_new_tokens is less than what was asked for

  int64_t total() const { return prompt + max_new_tokens; }
};

/// The length a policy gives to a request of prompt tokens that may grow to total.
/// native_length: RopeProfile::native_length of the model.
int64_t rope_length_of(const RopeLength& policy, int64_t prompt, int64_t total, int64_t session_len,
                       int64_t native_length);

/// Throws InvalidArgument for a bad option or id, ContextTooLong when the prompt leaves no room in
/// session_len (or in the length that fixes its profile), CapacityError when the request could
/// never have the blocks it may need; the message names the largest length that could.
/// config: resolved; kv_capacity: tokens the whole pool holds.
RequestLengths resolve_lengths(const Request& request, const EngineConfig& config,
                               int64_t native_length, int64_t vocab_size, int64_t kv_capacity);

}  // namespace longspan
