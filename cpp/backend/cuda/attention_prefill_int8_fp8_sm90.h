#pragma once

#include "backend/cuda/attention_prefill_sm90.h"
#include "backend/cuda/fp8_values.h"
#include "backend/cuda/int8_keys.h"

namespace longspan::cuda {

/// Prepares the kernel for the current device; once per device. An error on a card of another
/// compute capability than 9.0.
cudaError_t prepare_prefill_int8_fp8_sm90();

/// attention_prefill_int8_sm90 with weights and values in e4m3. Their products are summed up by
/// tensor cores over 128 keys only, and these sums in float32. Weights are divided by the sum of
/// what they were rounded to, so that a row whose weight is on one key gets its value.
cudaError_t attention_prefill_int8_fp8_sm90(const AttentionArgs& args, const Int8Keys& keys,
                                            const Fp8Values& values, const PrefillWorkSm90& work,
                                            cudaStream_t stream);

}  // namespace longspan::cuda
