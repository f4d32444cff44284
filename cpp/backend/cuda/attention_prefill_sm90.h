#pragma once

#include "backend/cuda/attention.h"
#include "backend/cuda/prefill_schedule_sm90.h"

namespace longspan::cuda {

/// A PrefillSchedule in device memory.
struct PrefillWorkSm90 {
  const PrefillTile* tiles = nullptr;
  const int32_t* first = nullptr;  ///< [num_clusters + 1]
  int32_t num_clusters = 0;
};

/// Prepares the kernel for the current device; once per device and head_dim, 64 or 128. An error on
/// a card of another compute capability than 9.0.
cudaError_t prepare_prefill_sm90(int32_t head_dim);

/// Attention of many rows on wgmma: writes the rows of the scheduled tiles. A row's result depends
/// on its query and its keys alone, bit for bit: neither on the chunk it is in nor on the batch.
///
/// Of the 64-token panel that holds a sequence's last key, the values beyond that key must be
/// finite, as rotate_append leaves them; keys beyond it may be anything.
cudaError_t attention_prefill_sm90(const AttentionArgs& args, const PrefillWorkSm90& work,
                                   cudaStream_t stream);

}  // namespace longspan::cuda
