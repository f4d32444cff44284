#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "backend/cuda/kv_layout.h"
#include "backend/cuda/plan_view.h"

namespace longspan::cuda {

/// One attention op over a layer's cache. Causal: row r of a sequence sees keys
/// [0, first_position + r]. bfloat16 in and out, float32 softmax and sums.
struct AttentionArgs {
  PlanView plan;
  KvLayout kv;
  int64_t layer = 0;
  const __nv_bfloat16* q = nullptr;  ///< [num_tokens][num_heads * head_dim], rotated
  int64_t q_stride = 0;              ///< elements between rows, a multiple of 8
  __nv_bfloat16* out = nullptr;      ///< the same shape
  int64_t out_stride = 0;
  int32_t num_heads = 0;  ///< a multiple of kv.num_kv_heads
};

/// Rows of one sequence and one query head: the unit of work of the prefill kernels.
struct PrefillTile {
  int32_t seq = 0;
  int32_t head = 0;
  int32_t row = 0;  ///< first row, counted within the sequence's rows of this step
};

/// A piece of one sequence's keys for one KV head: the unit of work of the decode kernel.
struct DecodeSpan {
  int32_t seq = 0;
  int32_t kv_head = 0;
  int32_t first_key = 0;  ///< a multiple of kPanelTokens
  int32_t num_keys = 0;
  int32_t partial = 0;  ///< slot of its partial result; -1: the only span, writes out directly
};

}  // namespace longspan::cuda
