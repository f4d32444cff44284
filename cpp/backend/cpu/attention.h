#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/step_plan.h"
#include "core/matrix.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// Backend::attention. A query row's output is a function of its own q, its position and the keys
/// of its sequence that are here alone, bit for bit: neither chunk size, block_len, batch company
/// nor thread count enter. Scores, online softmax (Milakov and Gimelshein 2018; the tiling of Dao
/// et al. 2022) and O are float32; the weights P enter P V rounded to the activation dtype, and
/// their sum is of the rounded values.
void attention(const Kernels& kernels, ThreadPool& pool, const CpuStepPlan& plan, int64_t layer,
               const MatrixView& q, const KvCache& cache, const MatrixView& out,
               const MatrixView* log_sum_exp);

}  // namespace longspan::cpu
