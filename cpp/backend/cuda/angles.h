#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/plan_view.h"

namespace longspan::cuda {

/// Fills what PlanView::row_seq and PlanView::cos_sin point to, of num_tokens rows, from the plan's
/// seqs and inv_freq: angles position * inv_freq, their sines and cosines in float64, then rounded.
/// A row of no sequence, as the padding of a fixed launch shape, gets row_seq -1.
/// row_seq: device [num_tokens]; cos_sin: device [num_tokens][rotary_pairs]{cos, sin}.
void fill_angles(const PlanView& plan, int32_t* row_seq, float* cos_sin, cudaStream_t stream);

}  // namespace longspan::cuda
