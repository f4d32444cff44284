#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/matrix.h"

namespace longspan::cuda {

/// Rows of x up to which linear_skinny beats a general product.
inline constexpr int64_t kSkinnyRows = 16;

/// y = x W^T + bias for few rows: bound by reading the weights once, which it does. x: bfloat16
/// [M, K], M <= kSkinnyRows; weight: bfloat16 [N][weight_stride], device; bias: device float32 [N],
/// or null; y: bfloat16 or float32 [M, N]. K and strides of x and weight are multiples of 8. Sums
/// are float32, in an order that depends on K alone.
void linear_skinny(const MatrixView& x, const void* weight, int64_t weight_stride,
                   const float* bias, const MatrixView& y, cudaStream_t stream);

/// y = silu(gate) * up, where gate | up = x W^T + bias, rounded to bfloat16 in between. weight:
/// [2 N][weight_stride]; y: bfloat16 [M, N]; the rest as above.
void linear_silu_mul_skinny(const MatrixView& x, const void* weight, int64_t weight_stride,
                            const float* bias, const MatrixView& y, cudaStream_t stream);

}  // namespace longspan::cuda
