#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/kv_cache.h"
#include "core/dtype.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// export_kv_block and import_kv_block of backend.h. dtype: of the cache.
void export_kv_block(ThreadPool& pool, const KvCache& cache, DType dtype, int32_t block,
                     int64_t tokens, std::span<std::byte> rows);
void import_kv_block(ThreadPool& pool, const KvCache& cache, DType dtype, int32_t block,
                     int64_t tokens, std::span<const std::byte> rows);

}  // namespace longspan::cpu
