#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/attention.h"
#include "core/matrix.h"

namespace longspan::cuda {

/// attention *= exp(l_own) / sum of exp(l_i), by row and head. log_sum_exps: float32 [T, parts
/// num_heads], part after part; attention: bfloat16 [T, num_heads D], D a multiple of 8.
void weigh_partial_attention(const MatrixView& log_sum_exps, int64_t own, int64_t num_heads,
                             const MatrixView& attention, cudaStream_t stream);

/// Of rows that see no key of this rank, writes what attention's kernels leave open: zeros to out,
/// minus infinity to log_sum_exp.
void clear_unseeing_rows(const AttentionArgs& args, cudaStream_t stream);

}  // namespace longspan::cuda
