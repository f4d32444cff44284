#pragma once

#include <cstdint>

#include "backend/cpu/panel.h"
#include "backend/kv_cache.h"
#include "backend/kv_quantize.h"
#include "core/dtype.h"

namespace longspan::cpu {

/// Keys of one key tile; a block holds block_len / kKeyTile of them.
inline constexpr int64_t kKeyTile = 64;

/// A tile of keys or of values. Its elements are in the layout of panel.h for the activation dtype:
/// themselves, or as codes of kv_quantize.h, a byte each, in int6 six bits and in int4 four; then
/// the parameters follow, bfloat16: of int4 the scales [groups][64 keys], then the zeros likewise;
/// of others the scales [64 keys]. A parameter of 0 makes elements of 0, whatever the code.
struct KvTile {
  KvElement element = KvElement::kNative;
  int64_t groups = 0;      ///< of a row, that have parameters of their own
  int64_t code_bytes = 0;  ///< of elements or codes: where the parameters begin
  int64_t bytes = 0;       ///< a multiple of 64

  /// elements: of the tile, head_dim's padding included.
  KvTile(KvElement element_, int64_t elements, int64_t head_dim, DType dtype) : element(element_) {
    switch (element) {
      case KvElement::kNative:
        code_bytes = elements * size_of(dtype);
        break;
      case KvElement::kInt8:
      case KvElement::kFp8:
        groups = 1;
        code_bytes = elements;
        break;
      case KvElement::kInt6:
        groups = 1;
        code_bytes = elements / 4 * 3;
        break;
      case KvElement::kInt4:
        groups = int4_groups(head_dim);
        code_bytes = elements / 2;
        break;
    }
    bytes = round_up(code_bytes + parameter_bytes(), 64);
  }

  int64_t parameter_bytes() const {
    return groups * kKeyTile * 2 * (element == KvElement::kInt4 ? 2 : 1);
  }

  /// Where code i of int4 is: of every 64, the first 32 are lower halves and the others upper.
  static constexpr int64_t byte_of_int4(int64_t i) { return i / 64 * 32 + i % 32; }
  static constexpr int shift_of_int4(int64_t i) { return static_cast<int>(i % 64 / 32 * 4); }
  /// Where code i of int6 is, in two's complement: of every 64 the lower four bits as in int4, then
  /// the upper two, of the first 16 in the lowest bits of 16 bytes and so on.
  static constexpr int64_t low_of_int6(int64_t i) { return i / 64 * 48 + i % 32; }
  static constexpr int64_t high_of_int6(int64_t i) { return i / 64 * 48 + 32 + i % 16; }
  static constexpr int shift_of_high(int64_t i) { return static_cast<int>(i % 64 / 16 * 2); }
};

/// Index within the tile of keys of element d of key n.
template <class Act>
constexpr int64_t key_index(int64_t d, int64_t n, int64_t head_dim) {
  return n / kPanelCols * padded_k<Act>(head_dim) * kPanelCols + index_in_panel<Act>(d, n);
}

/// Index within the tile of values of element d of key n.
template <class Act>
constexpr int64_t value_index(int64_t n, int64_t d) {
  return d / kPanelCols * padded_k<Act>(kKeyTile) * kPanelCols + index_in_panel<Act>(n, d);
}

/// Writes one code of a tile.
inline void store_code(const KvTile& tile, int64_t index, uint8_t code, uint8_t* codes) {
  const auto put = [&](int64_t at, int shift, int bits, int value) {
    const int mask = (1 << bits) - 1;
    codes[at] = static_cast<uint8_t>((codes[at] & ~(mask << shift)) | (value & mask) << shift);
  };
  if (tile.element == KvElement::kInt4) {
    put(KvTile::byte_of_int4(index), KvTile::shift_of_int4(index), 4, code);
  } else if (tile.element == KvElement::kInt6) {
    put(KvTile::low_of_int6(index), KvTile::shift_of_int4(index), 4, code);
    put(KvTile::high_of_int6(index), KvTile::shift_of_high(index), 2, code >> 4);
  } else {
    codes[index] = code;
  }
}

/// Reads one: a byte, of int6 with its sign.
inline uint8_t load_code(const KvTile& tile, int64_t index, const uint8_t* codes) {
  if (tile.element == KvElement::kInt4) {
    return codes[KvTile::byte_of_int4(index)] >> KvTile::shift_of_int4(index) & 0xf;
  }
  if (tile.element == KvElement::kInt6) {
    const int low = codes[KvTile::low_of_int6(index)] >> KvTile::shift_of_int4(index) & 0xf;
    const int high = codes[KvTile::high_of_int6(index)] >> KvTile::shift_of_high(index) & 3;
    return static_cast<uint8_t>(((low | high << 4) ^ 32) - 32);
  }
  return codes[index];
}

/// Where the tiles of a block are. A block is [layer][kv_head]{K, V}, tiles aligned to 64 bytes:
///   K: [key tile] of B = K^T [head_dim, 64 keys] in the layout of panel.h (2 panels), so that
///      S = Q K^T is a matrix product on the cache itself, or on the elements its codes stand for;
///   V: [key tile] of B = V [64 keys, head_dim] in the same layout, for O = P V.
/// Padding (of head_dim) is zero from allocation on: no op writes it. V of keys not yet appended
/// is made zero with the first key of their tile, because 0 x V of a masked key must be 0; K of
/// such keys may be anything, masked scores are never read. A block has room for an odd number of
/// heads, so that the tiles of one head in successive blocks do not fall into the same sets of the
/// second-level cache.
class KvTiles {
 public:
  KvTiles(const KvShape& shape, DType dtype)
      : num_kv_heads_(shape.num_kv_heads),
        tiles_per_block_(shape.block_len / kKeyTile),
        k_(key_element(shape.format),
           dtype == DType::kF32 ? panel_elements<float>(shape.head_dim, kKeyTile)
                                : panel_elements<bf16_t>(shape.head_dim, kKeyTile),
           shape.head_dim, dtype),
        v_(value_element(shape.format), panel_elements<float>(kKeyTile, shape.head_dim),
           shape.head_dim, dtype),
        head_bytes_(tiles_per_block_ * (k_.bytes + v_.bytes)),
        block_bytes_((shape.num_layers * num_kv_heads_ | 1) * head_bytes_) {}

  const KvTile& k() const { return k_; }
  const KvTile& v() const { return v_; }
  int64_t block_bytes() const { return block_bytes_; }

  /// Byte offsets in the pool of a key tile of a sequence (tile: index of the key / kKeyTile).
  int64_t k_offset(const int32_t* block_table, int64_t tile, int64_t layer, int64_t head) const {
    return head_offset(block_table, tile, layer, head) + tile % tiles_per_block_ * k_.bytes;
  }
  int64_t v_offset(const int32_t* block_table, int64_t tile, int64_t layer, int64_t head) const {
    return head_offset(block_table, tile, layer, head) + tiles_per_block_ * k_.bytes +
           tile % tiles_per_block_ * v_.bytes;
  }

 private:
  int64_t head_offset(const int32_t* block_table, int64_t tile, int64_t layer, int64_t head) const {
    return block_table[tile / tiles_per_block_] * block_bytes_ +
           (layer * num_kv_heads_ + head) * head_bytes_;
  }

  int64_t num_kv_heads_;
  int64_t tiles_per_block_;
  KvTile k_;
  KvTile v_;
  int64_t head_bytes_;
  int64_t block_bytes_;
};

}  // namespace longspan::cpu
