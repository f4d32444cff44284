#pragma once

#include <cstdint>
#include <span>

#include "backend/cpu/kernels.h"
#include "core/matrix.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

// The row-wise ops of backend.h. A row's result depends on that row alone, bit for bit. Only the
// cols of a matrix are written, never the gap up to its stride.

/// delta (may be null), residual: float32 [T, H]; weight: float32 [H]; out: act [T, H].
void rms_norm(const Kernels& kernels, ThreadPool& pool, const MatrixView* delta,
              const MatrixView& residual, const float* weight, float eps, const MatrixView& out);

/// gate_up: float32 [T, 2 I], gate | up; out: act [T, I].
void silu_mul(const Kernels& kernels, ThreadPool& pool, const MatrixView& gate_up,
              const MatrixView& out);

/// log_sum_exps: float32 [T, parts num_heads]; attention: act [T, num_heads D].
void weigh_partial_attention(ThreadPool& pool, const MatrixView& log_sum_exps, int64_t own,
                             int64_t num_heads, const MatrixView& attention);

/// in, out: the same dtype and cols; rows[i] in [0, in.rows).
void gather_rows(ThreadPool& pool, const MatrixView& in, std::span<const int64_t> rows,
                 const MatrixView& out);

/// in: float32 or bfloat16 [R, C]; out: float32 [R][C] without gaps.
void download(ThreadPool& pool, const MatrixView& in, float* out);

/// in: float32 [R][C] without gaps; out: float32 or bfloat16 [R, C].
void upload(ThreadPool& pool, const float* in, const MatrixView& out);

}  // namespace longspan::cpu
