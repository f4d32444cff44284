#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend/kv_cache.h"

namespace longspan::cuda {

/// copy_kv_block of backend.h, queued on the stream; what goes wrong shows at its next wait.
void copy_kv_block(const KvCache& cache, int32_t from, int32_t to, int64_t tokens,
                   cudaStream_t stream);

}  // namespace longspan::cuda
