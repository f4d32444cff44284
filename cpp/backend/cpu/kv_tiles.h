#pragma once

#include <cstdint>

#include "backend/cpu/panel.h"
#include "backend/kv_cache.h"
#include "core/dtype.h"

namespace longspan::cpu {

/// Keys of one key tile; a block holds block_len / kKeyTile of them.
inline constexpr int64_t kKeyTile = 64;

/// Where the tiles of a block are. A block is [layer][kv_head]{K, V}, K and V aligned to 1024
/// bytes:
///   K: [key tile] of B = K^T [head_dim, 64 keys] in the layout of panel.h (2 panels), so that
///      S = Q K^T is a matrix product on the cache itself;
///   V: [key tile] of B = V [64 keys, head_dim] in the same layout, for O = P V.
/// Elements are bfloat16 or float32. Padding (of head_dim) is zero from allocation on: no op writes
/// it. V of keys not yet appended is zeroed with the first key of their tile, because 0 x V of a
/// masked key must be 0; K of such keys may be anything, masked scores are never read.
/// A block has room for an odd number of heads, so that the tiles of one head in successive blocks
/// do not fall into the same sets of the second-level cache.
class KvTiles {
 public:
  KvTiles(const KvShape& shape, DType dtype)
      : num_kv_heads_(shape.num_kv_heads),
        tiles_per_block_(shape.block_len / kKeyTile),
        k_tile_bytes_(dtype == DType::kF32 ? panel_elements<float>(shape.head_dim, kKeyTile) * 4
                                           : panel_elements<bf16_t>(shape.head_dim, kKeyTile) * 2),
        v_tile_bytes_(size_of(dtype) * panel_elements<float>(kKeyTile, shape.head_dim)),
        k_bytes_(round_up(tiles_per_block_ * k_tile_bytes_, 1024)),
        head_bytes_(k_bytes_ + round_up(tiles_per_block_ * v_tile_bytes_, 1024)),
        block_bytes_((shape.num_layers * num_kv_heads_ | 1) * head_bytes_) {}

  int64_t block_bytes() const { return block_bytes_; }
  int64_t k_tile_bytes() const { return k_tile_bytes_; }
  int64_t v_tile_bytes() const { return v_tile_bytes_; }

  /// Byte offsets in the pool of a key tile of a sequence (tile: position / kKeyTile).
  int64_t k_offset(const int32_t* block_table, int64_t tile, int64_t layer, int64_t head) const {
    return head_offset(block_table, tile, layer, head) + tile % tiles_per_block_ * k_tile_bytes_;
  }
  int64_t v_offset(const int32_t* block_table, int64_t tile, int64_t layer, int64_t head) const {
    return head_offset(block_table, tile, layer, head) + k_bytes_ +
           tile % tiles_per_block_ * v_tile_bytes_;
  }

 private:
  int64_t head_offset(const int32_t* block_table, int64_t tile, int64_t layer, int64_t head) const {
    return block_table[tile / tiles_per_block_] * block_bytes_ +
           (layer * num_kv_heads_ + head) * head_bytes_;
  }

  int64_t num_kv_heads_;
  int64_t tiles_per_block_;
  int64_t k_tile_bytes_;
  int64_t v_tile_bytes_;
  int64_t k_bytes_;
  int64_t head_bytes_;
  int64_t block_bytes_;
};

}  // namespace longspan::cpu
