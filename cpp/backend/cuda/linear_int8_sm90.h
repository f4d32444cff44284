#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/int8_matrix.h"

namespace longspan::cuda {

/// y = x W^T + bias of more rows than linear_skinny_int8() takes, on sm_90a: sums in integers,
/// times both scales in float32. x: [M, K]; weight: [N, K]; bias: device float32 [N], or null; y:
/// bfloat16 [M, N]. K < 2^17, so that no sum overflows. An element depends on its row of x alone,
/// whatever M. num_sms: multiprocessors of the device.
cudaError_t linear_int8_sm90(const Int8Matrix& x, const Int8Matrix& weight, const float* bias,
                             const MatrixView& y, int num_sms, cudaStream_t stream);

/// Once for a device, before the first product.
cudaError_t prepare_linear_int8_sm90();

}  // namespace longspan::cuda
