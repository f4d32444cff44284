#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/partial_score.h"
#include "core/matrix.h"

namespace longspan::cuda {

/// Backend::score of rows of logits: exponentials in float32, their sums in float64 in an order
/// that depends on V alone. A NaN, +inf, or a row of nothing but -inf gives a score that is not
/// finite. logits: float32 [R, V], of the tokens from first_token on; targets, scores: device [R].
void score(const MatrixView& logits, int32_t first_token, const int32_t* targets,
           PartialScore* scores, cudaStream_t stream);

}  // namespace longspan::cuda
