#pragma once

#include <cstdint>

#include "backend/kv_cache.h"

#ifdef __CUDACC__
#define LONGSPAN_HOST_DEVICE __host__ __device__
#else
#define LONGSPAN_HOST_DEVICE
#endif

namespace longspan::cuda {

/// Tokens and elements of a panel, the unit in which a KV tile is stored and copied.
inline constexpr int kPanelTokens = 64;
inline constexpr int kPanelCols = 64;
inline constexpr int kPanelBytes = kPanelTokens * kPanelCols * 2;

/// Where the keys and values of one head lie in a bfloat16 block pool. K and V share one layout:
///
///   pool  [block][layer][kv_head]{K tile, V tile}
///   tile  [block_len / 64][panels_per_token = ceil(head_dim / 64)] panels of 8 KiB
///   panel [64 tokens][8 chunks of 16 bytes], chunk c of token t at c ^ (t % 8)
///
/// A panel is thus, byte for byte, what wgmma and ldmatrix read from shared memory in the 128-byte
/// swizzle: one bulk copy of 8 KiB brings it there, without a tensor map. Columns beyond head_dim
/// are zero.
struct KvLayout {
  char* pool = nullptr;
  int64_t block_bytes = 0;
  int64_t layer_bytes = 0;  ///< of one layer within a block
  int64_t tile_bytes = 0;   ///< of a K tile or a V tile
  int32_t block_len = 0;    ///< 64, 128 or 256
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t panels_per_token = 0;

  static KvLayout of(const KvShape& shape, void* pool = nullptr) {
    KvLayout l;
    l.pool = static_cast<char*>(pool);
    l.block_len = static_cast<int32_t>(shape.block_len);
    l.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
    l.head_dim = static_cast<int32_t>(shape.head_dim);
    l.panels_per_token = (l.head_dim + kPanelCols - 1) / kPanelCols;
    l.tile_bytes = int64_t{l.block_len / kPanelTokens} * l.panels_per_token * kPanelBytes;
    l.layer_bytes = 2 * l.tile_bytes * l.num_kv_heads;
    l.block_bytes = shape.num_layers * l.layer_bytes;
    return l;
  }

  /// The K tile of a block; its V tile follows tile_bytes later.
  LONGSPAN_HOST_DEVICE char* key_tile(int64_t block, int64_t layer, int64_t kv_head) const {
    return pool + block * block_bytes + layer * layer_bytes + kv_head * 2 * tile_bytes;
  }

  /// Byte offset within a tile of the 16-byte chunk (8 elements) `chunk` of a token's row.
  LONGSPAN_HOST_DEVICE int64_t chunk_offset(int token, int chunk) const {
    const int panel = token / kPanelTokens * panels_per_token + chunk / 8;
    const int row = token % kPanelTokens;
    const int within = row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
    return int64_t{panel} * kPanelBytes + within;
  }
};

}  // namespace longspan::cuda
