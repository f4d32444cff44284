#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/kv_layout.h"
#include "backend/cuda/plan_view.h"
#include "backend/cuda/prefill_tiles.h"

namespace longspan::cuda {

/// One attention op over a layer's cache. Causal: of the keys that are here, row r of a sequence
/// sees the first plan.context.keys(first_position + r + 1); a row that sees none is left to
/// clear_unseeing_rows(). bfloat16 in and out, float32 softmax and sums.
struct AttentionArgs {
  PlanView plan;
  KvLayout kv;
  int64_t layer = 0;
  const __nv_bfloat16* q = nullptr;  ///< [num_tokens][num_heads * head_dim], rotated
  int64_t q_stride = 0;              ///< elements between rows, a multiple of 8
  __nv_bfloat16* out = nullptr;      ///< the same shape
  int64_t out_stride = 0;
  float* log_sum_exp = nullptr;  ///< [num_tokens][num_heads], natural log; null: not asked for
  int64_t log_sum_exp_stride = 0;
  int32_t num_heads = 0;  ///< a multiple of kv.num_kv_heads
};

}  // namespace longspan::cuda
