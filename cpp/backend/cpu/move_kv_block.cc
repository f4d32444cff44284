#include "backend/cpu/move_kv_block.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/kv_tiles.h"
#include "backend/kv_rows.h"

namespace longspan::cpu {
namespace {

/// The keys or the values of one head in one tile, and the rows that are theirs. Byte: const where
/// the rows are read.
template <class Byte>
struct TileRows {
  const KvTile& tile;
  bool keys;
  int64_t head_dim;
  int64_t tokens;  ///< of the tile, from its first on
  char* data;      ///< of the tile
  Byte* rows;
  int64_t row_bytes;
  Byte* parameters;
  int64_t parameter_bytes;  ///< of a row

  template <class Act>
  int64_t index(int64_t token, int64_t d) const {
    return keys ? key_index<Act>(d, token, head_dim) : value_index<Act>(token, d);
  }
  /// Where parameter i of a row is, in the tile's bfloat16s: of int4 {scale, zero} by groups.
  int64_t parameter_index(int64_t token, int64_t i) const {
    const int64_t row = tile.element == KvElement::kInt4 ? i % 2 * tile.groups + i / 2 : int64_t{0};
    return row * kKeyTile + token;
  }
  char* tile_parameters() const { return data + tile.code_bytes; }
};

template <class Act>
void read_tile(const TileRows<std::byte>& t) {
  const auto* codes = reinterpret_cast<const uint8_t*>(t.data);
  for (int64_t token = 0; token < t.tokens; ++token) {
    std::byte* row = t.rows + token * t.row_bytes;
    for (int64_t d = 0; d < t.head_dim; ++d) {
      const int64_t index = t.index<Act>(token, d);
      if (t.tile.element == KvElement::kNative) {
        std::memcpy(row + d * sizeof(Act), t.data + index * sizeof(Act), sizeof(Act));
      } else if (t.tile.element == KvElement::kInt4) {
        const int code = load_code(t.tile, index, codes);
        const auto other = d % 2 == 0 ? std::byte{0} : row[d / 2];
        row[d / 2] = other | static_cast<std::byte>(code << (d % 2 * 4));
      } else {
        row[d] = std::byte{load_code(t.tile, index, codes)};
      }
    }
    for (int64_t i = 0; i < t.parameter_bytes / 2; ++i) {
      std::memcpy(t.parameters + token * t.parameter_bytes + 2 * i,
                  t.tile_parameters() + 2 * t.parameter_index(token, i), 2);
    }
  }
}

template <class Act>
void write_tile(const TileRows<const std::byte>& t) {
  auto* codes = reinterpret_cast<uint8_t*>(t.data);
  // Tokens that are not there count as not yet appended.
  if (t.tile.element != KvElement::kNative) {
    std::memset(t.tile_parameters(), 0, static_cast<size_t>(t.tile.parameter_bytes()));
  } else if (!t.keys) {
    std::memset(t.data, 0, static_cast<size_t>(t.tile.bytes));
  }
  for (int64_t token = 0; token < t.tokens; ++token) {
    const std::byte* row = t.rows + token * t.row_bytes;
    for (int64_t d = 0; d < t.head_dim; ++d) {
      const int64_t index = t.index<Act>(token, d);
      if (t.tile.element == KvElement::kNative) {
        std::memcpy(t.data + index * sizeof(Act), row + d * sizeof(Act), sizeof(Act));
      } else {
        const bool int4 = t.tile.element == KvElement::kInt4;
        const auto code = int4 ? row[d / 2] >> (d % 2 * 4) & std::byte{0xf} : row[d];
        store_code(t.tile, index, std::to_integer<uint8_t>(code), codes);
      }
    }
    for (int64_t i = 0; i < t.parameter_bytes / 2; ++i) {
      std::memcpy(t.tile_parameters() + 2 * t.parameter_index(token, i),
                  t.parameters + token * t.parameter_bytes + 2 * i, 2);
    }
  }
}

/// Calls move(TileRows) for each tile of the block that holds any of the tokens, those of a head by
/// one thread.
template <class Byte, class Move>
void for_each_tile(ThreadPool& pool, const KvCache& cache, DType dtype, int32_t block,
                   int64_t tokens, Byte* rows, const Move& move) {
  const KvTiles tiles(cache.shape, dtype);
  const KvRows layout(cache.shape, dtype, tokens);
  const auto move_head = [&](int64_t unit, int /*thread*/) {
    const int64_t layer = unit / cache.shape.num_kv_heads;
    const int64_t head = unit % cache.shape.num_kv_heads;
    for (int64_t first = 0; first < tokens; first += kKeyTile) {
      for (const bool keys : {true, false}) {
        const KvPart part = keys ? KvPart::kKeys : KvPart::kValues;
        const KvPart by = keys ? KvPart::kKeyParameters : KvPart::kValueParameters;
        const int64_t tile = first / kKeyTile;
        const int64_t offset = keys ? tiles.k_offset(&block, tile, layer, head)
                                    : tiles.v_offset(&block, tile, layer, head);
        move(TileRows<Byte>{keys ? tiles.k() : tiles.v(), keys, cache.shape.head_dim,
                            std::min(kKeyTile, tokens - first), cache.pool.as<char>() + offset,
                            layout.head(rows, part, layer, head) + first * layout.row_bytes(part),
                            layout.row_bytes(part),
                            layout.head(rows, by, layer, head) + first * layout.row_bytes(by),
                            layout.row_bytes(by)});
      }
    }
  };
  pool.parallel_for(cache.shape.num_layers * cache.shape.num_kv_heads, move_head);
}

}  // namespace

void export_kv_block(ThreadPool& pool, const KvCache& cache, DType dtype, int32_t block,
                     int64_t tokens, std::span<std::byte> rows) {
  for_each_tile(pool, cache, dtype, block, tokens, rows.data(), [dtype](const auto& tile) {
    dtype == DType::kF32 ? read_tile<float>(tile) : read_tile<bf16_t>(tile);
  });
}

void import_kv_block(ThreadPool& pool, const KvCache& cache, DType dtype, int32_t block,
                     int64_t tokens, std::span<const std::byte> rows) {
  for_each_tile(pool, cache, dtype, block, tokens, rows.data(), [dtype](const auto& tile) {
    dtype == DType::kF32 ? write_tile<float>(tile) : write_tile<bf16_t>(tile);
  });
}

}  // namespace longspan::cpu
