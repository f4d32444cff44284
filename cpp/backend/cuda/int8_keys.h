#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/plan_view.h"
#include "backend/cuda/quantize_args.h"

namespace longspan::cuda {

struct Int8PanelScale {
  float scale;   ///< what its elements are multiplied by
  float length;  ///< what no key of it, so multiplied, is longer than
};

/// Keys of some sequences and KV heads in eight bits, for products with queries in eight bits: each
/// sequence's one after another. head_dim is 128.
///
///   panels [kv_head][num_panels] of 8 KiB: [64 tokens][128], chunk c of 16 bytes of token t at
///          c ^ (t % 8), which wgmma reads in the 128-byte swizzle
///   scales [kv_head][num_panels]
struct Int8Keys {
  char* panels = nullptr;
  Int8PanelScale* scales = nullptr;
  float* means = nullptr;         ///< [num_seqs of the plan][kv_head][128], of quantize_keys
  const SeqView* seqs = nullptr;  ///< as they lie here: a sequence's panels begin at its `table`
  int32_t num_panels = 0;         ///< of a head
};

using QuantizeKeysArgs = QuantizeArgs<Int8Keys>;

/// Quantises every key of the sequences by panel and head: symmetric, the largest magnitude being
/// 127. What is quantised is a key less the mean of its head's, which takes the same from all
/// scores of a query and so leaves its softmax; keys tend to have a few elements far from zero,
/// whose scale would else be everyone's (SageAttention, arXiv 2410.02367). Tokens of a last panel
/// that the sequence does not have are zero.
cudaError_t quantize_keys(const QuantizeKeysArgs& args, cudaStream_t stream);

}  // namespace longspan::cuda
