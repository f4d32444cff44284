#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/matrix.h"

namespace longspan::cuda {

/// nll[r] = log sum exp(row r of logits) - logits[r][targets[r]]: exponentials in float32, their
/// sums in float64 in an order that depends on V alone. A NaN, +inf, or a row of nothing but -inf
/// gives a result that is not finite. logits: float32 or bfloat16 [R, V]; targets: device [R], each
/// in [0, V); nll: device [R].
void log_likelihood(const MatrixView& logits, const int32_t* targets, double* nll,
                    cudaStream_t stream);

}  // namespace longspan::cuda
