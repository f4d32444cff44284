#pragma once

#include <cstdint>

#include "core/memory.h"

namespace longspan {

/// What one attention kind caches per token.
struct KvShape {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;  ///< of this rank
  int64_t head_dim = 0;
  int64_t block_len = 0;  ///< tokens per block: 64, 128 or 256
};

/// The block pool's memory: [num_blocks] blocks of block_bytes, each [layer][kv_head]{K tile, V
/// tile}, tiles aligned to 1024 bytes. The order inside a tile is the backend's own.
struct KvCache {
  Buffer pool;
  KvShape shape;
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
};

}  // namespace longspan
