#pragma once

#include "backend/cuda/attention.h"

namespace longspan::cuda {

/// Prepares the kernel for the current device; once per device and head_dim, a multiple of 8 up to
/// 256.
cudaError_t prepare_prefill_mma(int32_t head_dim);

/// Attention of many rows on mma.sync, sm_80 and up: what there is no kernel of the card's own for.
/// Writes the rows of the tiles, [num_tiles] in device memory, of kPrefillRows rows at most each.
cudaError_t attention_prefill_mma(const AttentionArgs& args, const PrefillTile* tiles,
                                  int32_t num_tiles, cudaStream_t stream);

}  // namespace longspan::cuda
