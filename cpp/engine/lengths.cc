#include "engine/lengths.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "core/check.h"

namespace longspan {
namespace {

void check_generation(const GenerationConfig& g) {
  require<InvalidArgument>(!g.max_new_tokens || *g.max_new_tokens >= 0,
                           "max_new_tokens: expected an integer >= 0, got ",
                           g.max_new_tokens.value_or(0));
  require<InvalidArgument>(std::isfinite(g.temperature) && g.temperature > 0.0,
                           "temperature: expected a number > 0, got ", g.temperature);
  require<InvalidArgument>(g.top_k >= 0, "top_k: expected an integer >= 0, got ", g.top_k);
  require<InvalidArgument>(g.top_p > 0.0 && g.top_p <= 1.0,
                           "top_p: expected a number in (0, 1], got ", g.top_p);
  require<InvalidArgument>(g.min_p >= 0.0 && g.min_p <= 1.0,
                           "min_p: expected a number in [0, 1], got ", g.min_p);
  require<InvalidArgument>(std::isfinite(g.repetition_penalty) && g.repetition_penalty > 0.0,
                           "repetition_penalty: expected a number > 0, got ", g.repetition_penalty);
  require<InvalidArgument>(std::isfinite(g.frequency_penalty),
                           "frequency_penalty: expected a finite number, got ",
                           g.frequency_penalty);
  require<InvalidArgument>(std::isfinite(g.presence_penalty),
                           "presence_penalty: expected a finite number, got ", g.presence_penalty);
  require<InvalidArgument>(g.min_new_tokens >= 0, "min_new_tokens: expected an integer >= 0, got ",
                           g.min_new_tokens);
  require<InvalidArgument>(!g.max_new_tokens || g.min_new_tokens <= *g.max_new_tokens,
                           "min_new_tokens: expected at most max_new_tokens, got ",
                           g.min_new_tokens, " > ", g.max_new_tokens.value_or(0));
}

void check_tokens(const GenerationConfig& g, int64_t vocab_size) {
  const int64_t most = std::min<int64_t>(kMaxLogprobs, vocab_size);
  require<InvalidArgument>(!g.logprobs || (*g.logprobs >= 0 && *g.logprobs <= most),
                           "logprobs: expected an integer in [0, ", most, "], got ",
                           g.logprobs.value_or(0));
  std::set<int32_t> banned;  // whatever comes before
  for (const std::vector<int32_t>& sequence : g.bad_sequences) {
    require<InvalidArgument>(!sequence.empty(), "bad_sequences: expected at least 1 token in each");
    for (const int32_t id : sequence) {
      require<InvalidArgument>(id >= 0 && id < vocab_size,
                               "bad_sequences: expected token ids in [0, ", vocab_size, "), got ",
                               id);
    }
    if (sequence.size() == 1) banned.insert(sequence.front());
  }
  require<InvalidArgument>(std::ssize(banned) < vocab_size,
                           "bad_sequences: expected at least one token that may come, got none");
}

void check_ids(const Request& request, int64_t vocab_size) {
  const size_t least = request.kind == RequestKind::kScore ? 2 : 1;
  require<InvalidArgument>(request.input_ids.size() >= least, "input_ids: expected at least ",
                           least, " token ids, got ", request.input_ids.size());
  for (size_t i = 0; i < request.input_ids.size(); ++i) {
    const int32_t id = request.input_ids[i];
    require<InvalidArgument>(id >= 0 && id < vocab_size, "input_ids[", i,
                             "]: expected a token id in [0, ", vocab_size, "), got ", id);
  }
}

void check_positions(const Request& request) {
  int64_t previous = -1;
  for (const int64_t position : request.logit_positions) {
    require<InvalidArgument>(
        position > previous && position < static_cast<int64_t>(request.input_ids.size()),
        "logit_positions: expected ascending positions in [0, ", request.input_ids.size(),
        "), got ", position, " after ", previous);
    previous = position;
  }
  require<InvalidArgument>(previous >= 0, "logit_positions: expected at least one, got none");
}

/// The most tokens a request may reach under the session and its rope policy.
int64_t length_bound(const RopeLength& rope, int64_t session_len) {
  if (rope.policy != RopeLengthPolicy::kFixed) return session_len;
  return std::min(session_len, rope.tokens);
}

}  // namespace

int64_t rope_length_of(const RopeLength& policy, int64_t prompt, int64_t total, int64_t session_len,
                       int64_t native_length) {
  switch (policy.policy) {
    case RopeLengthPolicy::kPrompt:
      return prompt;
    case RopeLengthPolicy::kSession:
      return session_len;
    case RopeLengthPolicy::kFixed:
      return policy.tokens;
    case RopeLengthPolicy::kBucket: {
      int64_t length = native_length;
      while (length < total) length *= 2;
      return length;
    }
    case RopeLengthPolicy::kRequest:
      break;
  }
  return total;
}

RequestLengths resolve_lengths(const Request& request, const EngineConfig& config,
                               int64_t native_length, int64_t vocab_size, int64_t kv_capacity) {
  check_ids(request, vocab_size);
  RequestLengths lengths;
  lengths.prompt = static_cast<int64_t>(request.input_ids.size());
  const RopeLength rope = request.rope_length.value_or(config.rope_length);
  require<InvalidArgument>(rope.policy != RopeLengthPolicy::kFixed || rope.tokens >= 1,
                           "rope_length: expected an integer >= 1, got ", rope.tokens);
  const int64_t bound = length_bound(rope, config.session_len);
  int64_t wanted = 0;  // new tokens asked for
  if (request.kind == RequestKind::kGenerate) {
    check_generation(request.generation);
    check_tokens(request.generation, vocab_size);
    wanted = request.generation.max_new_tokens.value_or(std::numeric_limits<int64_t>::max());
  } else if (request.kind == RequestKind::kLogits) {
    check_positions(request);
  }
  const int64_t room = bound - lengths.prompt;
  if (room < std::min<int64_t>(wanted, 1)) {
    throw ContextTooLong(lengths.prompt, bound, kv_capacity);
  }
  lengths.max_new_tokens = std::min(wanted, room);
  lengths.clamped = lengths.max_new_tokens < wanted;
  require<CapacityError>(
      lengths.total() <= kv_capacity, "expected prompt + max_new_tokens of at most ", kv_capacity,
      " tokens (the whole KV cache), got ", lengths.prompt, " + ", lengths.max_new_tokens);
  lengths.rope_length =
      rope_length_of(rope, lengths.prompt, lengths.total(), config.session_len, native_length);
  return lengths;
}

}  // namespace longspan
