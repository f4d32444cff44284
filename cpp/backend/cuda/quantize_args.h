#pragma once

#include <cstdint>

#include "backend/cuda/kv_layout.h"
#include "backend/cuda/plan_view.h"

namespace longspan::cuda {

/// What of a cache is staged in eight bits for a pass, and where to: Int8Keys or Fp8Values.
template <class To>
struct QuantizeArgs {
  PlanView plan;
  KvLayout from;  ///< in bfloat16
  int64_t layer = 0;
  To to;
  const int32_t* seqs = nullptr;  ///< [num_seqs], of the sequences, to.seqs' `table` growing
  int32_t num_seqs = 0;
};

}  // namespace longspan::cuda
