#pragma once

#include <cstdint>

#include "checkpoint/model_config.h"

namespace longspan {

/// Predicts how long prefill takes, so that a step's size is chosen in seconds: the arithmetic of
/// the model over the rate that steps have reached lately. It moves only chunk boundaries, which
/// results do not depend on.
class StepCost {
 public:
  /// flops_per_second: a first guess at the rate, until steps have been measured. target_seconds:
  /// how long a step may take, so that cancellation, progress and other requests stay prompt.
  /// least_tokens: of a chunk, whatever its time: smaller ones would lower the rate, and the lower
  /// rate the chunks, without end. A chunk that time cuts short is a multiple of it.
  explicit StepCost(const ModelConfig& config, double flops_per_second = 1.0,
                    double target_seconds = 1.0, int64_t least_tokens = 64);

  /// FLOPs of `tokens` tokens whose first stands at first_position: 2 per weight of a linear, and
  /// 4 head_dim per query head, query and key (Q K^T and P V, causal half counted).
  double flops(int64_t tokens, int64_t first_position) const;

  /// All `wanted` tokens at first_position if they keep a step within a share (0, 1] of the target
  /// time or are at most least_tokens; else the most that do in multiples of least_tokens, one at
  /// least.
  int64_t fitting_tokens(int64_t wanted, int64_t first_position, double share = 1.0) const;

  /// A step of this much arithmetic took this long.
  void measured(double flops, double seconds);

 private:
  double flops_per_token_;  // linears
  double flops_per_pair_;   // attention, per (query, key)
  double target_seconds_;
  int64_t least_tokens_;
  double flops_per_second_;
};

}  // namespace longspan
