#pragma once

#include "backend/cuda/int8_matrix.h"

namespace longspan::cuda {

/// linear_skinny() of turned bytes, on compute capability 9.0: y = x W^T + bias, sums in integers,
/// times both scales in float32. x: [M, K], M <= kSkinnyRows; weight: [N, K]; bias: device float32
/// [N], or null; y: bfloat16 [M, N]. K < 2^17, so that no sum overflows.
void linear_skinny_int8(const Int8Matrix& x, const Int8Matrix& weight, const float* bias,
                        const MatrixView& y, cudaStream_t stream);

/// linear_silu_mul_skinny() of the same. weight: [2 N, K]; y: bfloat16 [M, N].
void linear_silu_mul_skinny_int8(const Int8Matrix& x, const Int8Matrix& weight, const float* bias,
                                 const MatrixView& y, cudaStream_t stream);

}  // namespace longspan::cuda
