#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/kv_layout.h"
#include "backend/cuda/plan_view.h"
#include "core/matrix.h"

namespace longspan::cuda {

/// Rotation of a step's queries and keys, and the append of its keys and values to a layer's cache.
struct RotateAppendArgs {
  PlanView plan;
  KvLayout kv;
  int64_t layer = 0;
  /// [num_tokens, (num_heads + 2 num_kv_heads) head_dim], q | k | v, bfloat16
  MatrixView qkv;
  __nv_bfloat16* q_out = nullptr;  ///< [num_tokens][num_heads * head_dim]
  int64_t q_stride = 0;            ///< elements between rows
  int32_t num_heads = 0;
  const float* q_norm = nullptr;    ///< [head_dim], weights of a norm per head before the rotation,
  const float* k_norm = nullptr;    ///< as in Qwen3; null: none
  float norm_eps = 0.0f;            ///< of both norms
  const float* q_factor = nullptr;  ///< [num_tokens], multiplies rotated queries; null: none
};

/// Pair (i, i + rotary_pairs) of every q and k head turns by the plan's angle i; dimensions from
/// 2 rotary_pairs on pass through. All in float32, rounded to bfloat16 once, or quantised as
/// kv_quantize.h says. head_dim: even, at most 256; a multiple of 8 where the cache is quantised.
/// Elements of a row beyond head_dim are set to zero, and so are, in bfloat16, values of the
/// panel's tokens after the last one of a sequence where the panel was begun in this step: stale
/// values are never multiplied with a probability. Codes and scales of tokens that are not there
/// may be anything. A row whose row_seq is negative is left alone.
void rotate_append(const RotateAppendArgs& args, cudaStream_t stream);

}  // namespace longspan::cuda
