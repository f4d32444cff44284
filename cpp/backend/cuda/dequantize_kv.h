#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/kv_layout.h"
#include "backend/cuda/plan_view.h"

namespace longspan::cuda {

/// Keys and values of some sequences and KV heads of a layer, from a quantised cache to one in
/// bfloat16 that the prefill kernels read.
struct DequantizeKvArgs {
  PlanView plan;  ///< of the step: where the sequences' blocks are
  KvLayout from;
  int64_t layer = 0;
  int32_t first_kv_head = 0;  ///< head h of `to` is head first_kv_head + h of `from`
  KvLayout to;                ///< kNative, of one layer, blocks of kPanelTokens tokens
  /// The sequences as `to` has them: a sequence's keys are in the blocks from its `table` on, one
  /// after another.
  const SeqView* staged = nullptr;
  const int32_t* seqs = nullptr;  ///< [num_seqs], indices of the sequences, `table` growing
  int32_t num_seqs = 0;
  int32_t num_panels = 0;  ///< blocks of `to` that they fill
};

/// An element times its scale is rounded to bfloat16 once: a relative error of 2^-9. Tokens of a
/// last panel that the sequence does not have are zero.
cudaError_t dequantize_kv(const DequantizeKvArgs& args, cudaStream_t stream);

}  // namespace longspan::cuda
