#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/plan_view.h"
#include "backend/cuda/quantize_args.h"

namespace longspan::cuda {

/// Values of some sequences and KV heads in e4m3, transposed, for products with weights in e4m3:
/// each sequence's one after another. head_dim is 128.
///
///   panels [kv_head][num_panels] of 8 KiB: [128][64 tokens], chunk c of 16 tokens of row r at
///          c ^ (r / 2 % 4), which wgmma reads in the 64-byte swizzle; byte 4 t + 2 j + i of a
///          chunk is its token 8 j + 2 t + i, so that the weights that a thread has of it follow
///          each other
///   scales [kv_head][num_panels], what its elements are multiplied by: powers of two, the same in
///          both panels of a step of 128 tokens
struct Fp8Values {
  char* panels = nullptr;
  float* scales = nullptr;
  const SeqView* seqs = nullptr;  ///< as they lie here: a sequence's panels begin at its `table`
  int32_t num_panels = 0;         ///< of a head
};

using QuantizeValuesArgs = QuantizeArgs<Fp8Values>;

/// Quantises every value of the sequences by step and head, the largest magnitude being above 224
/// and at most 448, the largest of e4m3. Scales being powers of two, an element that is not far
/// below its step's largest is rounded the same wherever steps begin and end. Tokens of a last
/// panel that the sequence does not have are zero.
cudaError_t quantize_values(const QuantizeValuesArgs& args, cudaStream_t stream);

}  // namespace longspan::cuda
