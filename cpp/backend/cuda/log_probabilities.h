#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/matrix.h"
#include "longspan/logprob.h"

namespace longspan::cuda {

/// Backend::log_probabilities on device memory. logits: float32 [R, V]; tokens: device [R], each in
/// [0, V); 0 <= top <= min(V, kMaxLogprobs); out: device [R][1 + top], first tokens[r], then the
/// row's likeliest tokens, likeliest first. A row that is not finite tells NaN, and of no token.
void log_probabilities(const MatrixView& logits, const int32_t* tokens, int32_t top,
                       TokenLogprob* out, cudaStream_t stream);

}  // namespace longspan::cuda
