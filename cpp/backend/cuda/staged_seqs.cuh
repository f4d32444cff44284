#pragma once

#include <cstdint>

#include "backend/cuda/plan_view.h"

namespace longspan::cuda {

/// The index of the sequence that has a panel of a workspace of prefills. staged: the sequences as
/// the workspace has them, each from the panel `table` on; seqs: [num_seqs], those of the pass,
/// `table` growing.
__device__ inline int seq_of_panel(const SeqView* staged, const int32_t* seqs, int num_seqs,
                                   int panel) {
  int low = 0;
  for (int high = num_seqs; high - low > 1;) {
    const int middle = (low + high) / 2;
    (staged[seqs[middle]].table <= panel ? low : high) = middle;
  }
  return seqs[low];
}

}  // namespace longspan::cuda
