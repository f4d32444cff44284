#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/sampler.h"
#include "core/matrix.h"

namespace longspan::cuda {

/// Backend::sample without a word to the host; see cpu/sample.h for what is drawn. Weights are held
/// in units of 2^-44 of the likeliest token's, so that sums are exact in any order.
/// logits: float32 [R, V], V at most 2^19, the same after as before; rows: device [R], their edits
/// in device memory as well; tokens: device [R]; on_host: [R], the same in page-locked memory.
void sample(const MatrixView& logits, const SamplerRow* rows, int32_t* tokens, int32_t* on_host,
            cudaStream_t stream);

}  // namespace longspan::cuda
