#pragma once

#include <cstdint>

namespace longspan {

/// The most GenerationConfig::logprobs may ask for at a position.
inline constexpr int32_t kMaxLogprobs = 1024;

/// A token and the natural log of its probability: log softmax of the model's logits, before
/// penalties, bans, temperature and filters.
struct TokenLogprob {
  int32_t token = -1;
  float logprob = 0.0f;
};

}  // namespace longspan
