#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/kv_cache.h"

namespace longspan::cuda {

/// Between a block of the cache, copied to host memory as it is (KvLayout::block_bytes), and the
/// KvRows of its first `tokens` tokens in bfloat16. All of a block that is made of rows but these
/// is zero.
void rows_of_block(const KvShape& shape, const char* block, int64_t tokens,
                   std::span<std::byte> rows);
void block_of_rows(const KvShape& shape, std::span<const std::byte> rows, int64_t tokens,
                   char* block);

}  // namespace longspan::cuda
