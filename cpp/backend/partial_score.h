#pragma once

#include <cmath>
#include <limits>
#include <span>

namespace longspan {

/// What a part of the vocabulary adds to the score of a row: its logits x as max = the largest and
/// sum = the sum of exp(x - max), and the target's logit, 0 where another part has it.
struct PartialScore {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0.0;
  double target = 0.0;
};

/// The negative log-likelihood, natural log, of the target under the softmax over all parts, added
/// up in their order. Not finite where an input was not.
inline double negative_log_likelihood(std::span<const PartialScore> parts) {
  double max = parts.front().max;
  for (const PartialScore& part : parts) max = part.max > max ? part.max : max;
  double sum = 0.0;
  double target = 0.0;
  for (const PartialScore& part : parts) {
    sum += part.sum * std::exp(part.max - max);
    target += part.target;
  }
  return std::log(sum) + max - target;
}

}  // namespace longspan
