#pragma once

#include <cstdint>
#include <span>

#include "backend/cpu/kernels.h"
#include "core/matrix.h"
#include "core/thread_pool.h"
#include "longspan/logprob.h"

namespace longspan::cpu {

/// Backend::log_probabilities: logits float32 [R, V], log-sum-exp in float64, rows in parallel.
void log_probabilities(const Kernels& kernels, ThreadPool& pool, const MatrixView& logits,
                       std::span<const int32_t> tokens, int64_t top, std::span<TokenLogprob> out);

}  // namespace longspan::cpu
