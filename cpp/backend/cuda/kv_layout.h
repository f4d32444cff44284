#pragma once

#include <cstdint>
#include <utility>

#include "backend/kv_cache.h"
#include "backend/kv_quantize.h"

#ifdef __CUDACC__
#define LONGSPAN_HOST_DEVICE __host__ __device__
#else
#define LONGSPAN_HOST_DEVICE
#endif

namespace longspan::cuda {

/// Tokens of a panel, the unit in which a KV tile is stored and copied; and elements and bytes of a
/// row of one in bfloat16.
inline constexpr int kPanelTokens = 64;
inline constexpr int kPanelCols = 64;
inline constexpr int kPanelBytes = kPanelTokens * kPanelCols * 2;

/// Of an element in a tile's rows: bfloat16 where native; int4, and the low bits of int6, two to a
/// byte, the even element low.
LONGSPAN_HOST_DEVICE constexpr int bits_of(KvElement element) {
  return element == KvElement::kNative                                ? 16
         : element == KvElement::kInt4 || element == KvElement::kInt6 ? 4
                                                                      : 8;
}

/// Bytes of a token's high bits.
LONGSPAN_HOST_DEVICE constexpr int kv_high_bytes(KvElement element, int row_dim) {
  return element == KvElement::kInt6 ? row_dim / 4 : 0;
}

/// Bytes of a token's scales; row_dim: KvLayout's.
LONGSPAN_HOST_DEVICE constexpr int kv_scale_bytes(KvElement element, int row_dim) {
  return element == KvElement::kNative ? 0
         : element == KvElement::kInt4 ? row_dim / static_cast<int>(kInt4Group) * 4
                                       : 2;
}

/// The keys or the values of one head in a block, and what they are multiplied by:
///
///   tile   [block_len / 64][panels] panels
///   panel  [64 tokens][row_bytes], chunk c of 16 bytes of token t at c ^ (t row_bytes / 128 %
///          (row_bytes / 16))
///   high   [block_len][4][row_dim / 32] words of 16 bits, in int6 alone: word [c % 4][c / 4] is of
///          elements 8 c on, two bits each, the upper ones of a code in two's complement; bits
///          4 i + 2 and 4 i on are those of elements 2 i and 2 i + 1
///   scales [block_len][scale_bytes]: bfloat16; the scale of a token, of int4 [groups]{scale, zero}
///
/// A panel is thus, byte for byte, what wgmma and ldmatrix read from shared memory in the swizzle
/// of row_bytes, 128, 64 or 32: one bulk copy brings it there, without a tensor map.
struct KvTile {
  KvElement element = KvElement::kNative;
  int32_t row_bytes = 0;
  int32_t panels = 0;       ///< that a token's elements are in
  int32_t high_bytes = 0;   ///< per token; 0: none
  int32_t scale_bytes = 0;  ///< likewise
  int64_t offset = 0;       ///< of the tile, from where the head begins in the block
  int64_t high = 0;         ///< of the high bits
  int64_t scales = 0;       ///< of the scales

  LONGSPAN_HOST_DEVICE int panel_bytes() const { return kPanelTokens * row_bytes; }
  /// Byte offset within the tile of the 16-byte chunk `chunk` of a token's elements.
  LONGSPAN_HOST_DEVICE int64_t chunk_offset(int token, int chunk) const {
    const int chunks = row_bytes / 16;
    const int panel = token / kPanelTokens * panels + chunk / chunks;
    const int row = token % kPanelTokens;
    const int within = (chunk % chunks) ^ (row * row_bytes / 128 % chunks);
    const int in_panel = row * row_bytes + within * 16;
    return int64_t{panel} * panel_bytes() + in_panel;
  }
  /// Of element i of eight, where its high bits are in their word.
  LONGSPAN_HOST_DEVICE static constexpr int high_shift(int i) {
    return i / 2 * 4 + (i % 2 == 0 ? 2 : 0);
  }
  /// Byte offset from where the head begins of the high bits of elements 8 `eight` on.
  LONGSPAN_HOST_DEVICE int64_t high_offset(int token, int eight) const {
    const int in_row = eight % 4 * (high_bytes / 4) + eight / 4 * 2;
    return high + int64_t{token} * high_bytes + in_row;
  }
};

/// Where the keys and values of one head lie in a block pool:
///
///   pool [block][layer][kv_head]{K tile, V tile, K high bits, K scales, V scales}
///
/// In bfloat16 K and V share one layout, panels of 8 KiB, and have no scales. Elements of a row
/// beyond head_dim are zero.
struct KvLayout {
  char* pool = nullptr;
  int64_t block_bytes = 0;
  int64_t layer_bytes = 0;  ///< of one layer within a block
  int64_t head_bytes = 0;   ///< of one head within a layer, a multiple of 128
  int32_t block_len = 0;    ///< 64, 128 or 256
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t row_dim = 0;  ///< head_dim and the zeros behind it
  KvTile key;
  KvTile value;

  static KvLayout of(const KvShape& shape, void* pool = nullptr) {
    KvLayout l;
    l.pool = static_cast<char*>(pool);
    l.block_len = static_cast<int32_t>(shape.block_len);
    l.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
    l.head_dim = static_cast<int32_t>(shape.head_dim);
    l.row_dim = row_dim_of(shape);
    for (const auto& [tile, element] :
         {std::pair{&l.key, key_element(shape.format)}, {&l.value, value_element(shape.format)}}) {
      const int bytes = l.row_dim * bits_of(element) / 8;
      tile->element = element;
      tile->row_bytes = bytes < 128 ? bytes : 128;
      tile->panels = bytes / tile->row_bytes;
      tile->offset = l.head_bytes;
      l.head_bytes += int64_t{l.block_len} * bytes;
    }
    for (KvTile* tile : {&l.key, &l.value}) {
      tile->high_bytes = kv_high_bytes(tile->element, l.row_dim);
      tile->high = l.head_bytes;
      l.head_bytes += int64_t{l.block_len} * tile->high_bytes;
      tile->scale_bytes = kv_scale_bytes(tile->element, l.row_dim);
      tile->scales = l.head_bytes;
      l.head_bytes += int64_t{l.block_len} * tile->scale_bytes;
    }
    l.layer_bytes = l.head_bytes * l.num_kv_heads;
    l.block_bytes = shape.num_layers * l.layer_bytes;
    return l;
  }

  /// The K tile of a block, where the head begins; its others follow at the offsets of their
  /// KvTile.
  LONGSPAN_HOST_DEVICE char* key_tile(int64_t block, int64_t layer, int64_t kv_head) const {
    return pool + block * block_bytes + layer * layer_bytes + kv_head * head_bytes;
  }

 private:
  /// Whole rows of 128 bytes in bfloat16; quantised, a power of two.
  static int32_t row_dim_of(const KvShape& shape) {
    const auto head_dim = static_cast<int32_t>(shape.head_dim);
    if (shape.format == KvFormat::kNative) {
      return (head_dim + kPanelCols - 1) / kPanelCols * kPanelCols;
    }
    return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  }
};

}  // namespace longspan::cuda
