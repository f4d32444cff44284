#pragma once

#include "backend/cuda/attention_prefill_sm90.h"
#include "backend/cuda/int8_keys.h"

namespace longspan::cuda {

/// Prepares the kernel for the current device; once per device. An error on a card of another
/// compute capability than 9.0.
cudaError_t prepare_prefill_int8_sm90();

/// attention_prefill_sm90 for head_dim 128 with queries and keys in eight bits: their products are
/// exact sums of 8-bit products, on twice as fast tensor cores; weights and values are bfloat16.
/// Values come from args.kv, keys from `keys`. Queries are quantised as they come in, by row and
/// head.
cudaError_t attention_prefill_int8_sm90(const AttentionArgs& args, const Int8Keys& keys,
                                        const PrefillWorkSm90& work, cudaStream_t stream);

}  // namespace longspan::cuda
