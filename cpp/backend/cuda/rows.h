#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/matrix.h"

namespace longspan::cuda {

// The row-wise ops of backend.h, queued on a stream. Matrices lie in device memory; where pointers
// and row lengths allow, memory is read and written 16 bytes at a time. A row's result depends on
// that row alone, bit for bit. Only the cols of a matrix are written, never the gap up to its
// stride.

/// out[t] = table[token_ids[t] - first_token], zeros where the table has no such row.
/// token_ids: device [out.rows], where drawn_token(i) stands for drawn[i]; table: bfloat16, out:
/// float32, the same cols.
void embedding(const int32_t* token_ids, const int32_t* drawn, const MatrixView& table,
               int32_t first_token, const MatrixView& out, cudaStream_t stream);

/// residual += delta (unless null), then out = residual / sqrt(mean(residual^2) + eps) * weight, in
/// float32. delta, out: bfloat16 [T, H]; residual: float32 [T, H]; weight: device float32 [H].
void rms_norm(const MatrixView* delta, const MatrixView& residual, const float* weight, float eps,
              const MatrixView& out, cudaStream_t stream);

/// out = silu(gate) * up, in float32. gate_up: bfloat16 [T, 2 I], gate | up; out: bfloat16 [T, I].
void silu_mul(const MatrixView& gate_up, const MatrixView& out, cudaStream_t stream);

/// out[i] = in[rows[i]]. rows: device [out.rows]; in, out: the same cols, each float32 or bfloat16.
void gather_rows(const MatrixView& in, const int64_t* rows, const MatrixView& out,
                 cudaStream_t stream);

/// out = in, converted to the dtype of out, each float32 or bfloat16. The same rows and cols.
void convert(const MatrixView& in, const MatrixView& out, cudaStream_t stream);

}  // namespace longspan::cuda
