#include "engine/step_cost.h"

#include <algorithm>

namespace longspan {
namespace {

constexpr double kNewWeight = 0.3;  // of the latest step in the running average
// Small steps measure memory bandwidth and overhead, not arithmetic.
constexpr double kMinMeasuredSeconds = 0.01;

}  // namespace

StepCost::StepCost(const ModelConfig& c, double flops_per_second, double target_seconds,
                   int64_t least_tokens)
    : flops_per_token_(2.0 * static_cast<double>(c.num_layers) *
                       static_cast<double>(c.hidden_size) *
                       static_cast<double>((2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim +
                                           3 * c.intermediate_size)),
      flops_per_pair_(4.0 * static_cast<double>(c.num_layers * c.num_heads * c.head_dim)),
      target_seconds_(target_seconds),
      least_tokens_(least_tokens),
      flops_per_second_(flops_per_second) {}

double StepCost::flops(int64_t tokens, int64_t first_position) const {
  const auto t = static_cast<double>(tokens);
  return t * (flops_per_token_ + flops_per_pair_ * (static_cast<double>(first_position) + t / 2));
}

int64_t StepCost::fitting_tokens(int64_t wanted, int64_t first_position, double share) const {
  const double budget = flops_per_second_ * target_seconds_ * share;
  if (wanted <= least_tokens_ || flops(wanted, first_position) <= budget) return wanted;
  int64_t tokens = wanted / least_tokens_ * least_tokens_;
  while (tokens > least_tokens_ && flops(tokens, first_position) > budget) tokens -= least_tokens_;
  return tokens;
}

void StepCost::measured(double flops, double seconds) {
  if (seconds < kMinMeasuredSeconds) return;
  flops_per_second_ += kNewWeight * (flops / seconds - flops_per_second_);
}

}  // namespace longspan
