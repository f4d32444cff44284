#pragma once

#include <cstdint>

#include "backend/kv_cache.h"
#include "core/dtype.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// copy_kv_block of backend.h. dtype: of the cache.
void copy_kv_block(ThreadPool& pool, const KvCache& cache, DType dtype, int32_t from, int32_t to,
                   int64_t tokens);

}  // namespace longspan::cpu
