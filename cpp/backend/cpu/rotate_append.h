#pragma once

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/step_plan.h"
#include "core/matrix.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// Backend::rotate_append. One thread appends all of a step's tokens of a (key tile, KV head), so
/// that no two threads write to one cache line.
void rotate_append(const Kernels& kernels, ThreadPool& pool, const CpuStepPlan& plan, int64_t layer,
                   const MatrixView& qkv, const QkNorm* norm, const KvCache& cache,
                   const MatrixView& q_out);

}  // namespace longspan::cpu
