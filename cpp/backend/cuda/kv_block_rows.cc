#include "backend/cuda/kv_block_rows.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/kv_layout.h"
#include "backend/kv_rows.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kChunkBytes = 16;

/// Eight codes of int6 as KvTile has them.
struct EightInt6 {
  uint32_t low = 0;
  uint16_t high = 0;

  uint32_t code(int i) const {
    return (low >> 4 * i & 15U) | (high >> KvTile::high_shift(i) & 3U) << 4;
  }
  void set(int i, uint32_t code) {
    low |= (code & 15U) << 4 * i;
    high = static_cast<uint16_t>(high | (code >> 4 & 3U) << KvTile::high_shift(i));
  }
};

/// Calls move(bytes in the block, bytes in the rows, count) for every run that is unbroken in both,
/// and of int6 move_int6(low bits and high bits in the block, codes in the rows) for every eight.
template <class BlockByte, class RowByte, class Move, class MoveInt6>
void for_each_run(const KvShape& shape, BlockByte* block, int64_t tokens, RowByte* rows,
                  const Move& move, const MoveInt6& move_int6) {
  const KvLayout layout = KvLayout::of(shape);
  const KvRows order(shape, DType::kBF16, tokens);
  for (int64_t unit = 0; unit < shape.num_layers * shape.num_kv_heads; ++unit) {
    const int64_t layer = unit / shape.num_kv_heads;
    const int64_t head = unit % shape.num_kv_heads;
    BlockByte* in_block = block + layer * layout.layer_bytes + head * layout.head_bytes;
    for (const bool keys : {true, false}) {
      const KvTile& tile = keys ? layout.key : layout.value;
      const KvPart part = keys ? KvPart::kKeys : KvPart::kValues;
      const KvPart by = keys ? KvPart::kKeyParameters : KvPart::kValueParameters;
      RowByte* row = order.head(rows, part, layer, head);
      RowByte* parameters = order.head(rows, by, layer, head);
      const int64_t row_bytes = order.row_bytes(part);
      const int64_t parameter_bytes = order.row_bytes(by);
      for (int token = 0; token < tokens; ++token) {
        RowByte* of_token = row + token * row_bytes;
        if (tile.element == KvElement::kInt6) {
          for (int eight = 0; eight < shape.head_dim / 8; ++eight) {
            move_int6(in_block + tile.offset + tile.chunk_offset(token, eight / 4) + eight % 4 * 4,
                      in_block + tile.high_offset(token, eight), of_token + eight * 8);
          }
        } else {  // what is left of the tile's row lies behind the head
          for (int64_t at = 0; at < row_bytes; at += kChunkBytes) {
            move(in_block + tile.offset +
                     tile.chunk_offset(token, static_cast<int>(at / kChunkBytes)),
                 of_token + at, static_cast<size_t>(std::min(kChunkBytes, row_bytes - at)));
          }
        }
        // A token's parameters begin as in its row; those of dims behind the head follow.
        move(in_block + tile.scales + int64_t{token} * tile.scale_bytes,
             parameters + token * parameter_bytes, static_cast<size_t>(parameter_bytes));
      }
    }
  }
}

}  // namespace

void rows_of_block(const KvShape& shape, const char* block, int64_t tokens,
                   std::span<std::byte> rows) {
  for_each_run(
      shape, block, tokens, rows.data(),
      [](const char* in_block, std::byte* in_rows, size_t count) {
        std::memcpy(in_rows, in_block, count);
      },
      [](const char* low, const char* high, std::byte* codes) {
        EightInt6 eight;
        std::memcpy(&eight.low, low, sizeof(eight.low));
        std::memcpy(&eight.high, high, sizeof(eight.high));
        for (int i = 0; i < 8; ++i) codes[i] = static_cast<std::byte>((eight.code(i) ^ 32U) - 32U);
      });
}

void block_of_rows(const KvShape& shape, std::span<const std::byte> rows, int64_t tokens,
                   char* block) {
  std::memset(block, 0, static_cast<size_t>(KvLayout::of(shape).block_bytes));
  for_each_run(
      shape, block, tokens, rows.data(),
      [](char* in_block, const std::byte* in_rows, size_t count) {
        std::memcpy(in_block, in_rows, count);
      },
      [](char* low, char* high, const std::byte* codes) {
        EightInt6 eight;
        for (int i = 0; i < 8; ++i) eight.set(i, std::to_integer<uint32_t>(codes[i]));
        std::memcpy(low, &eight.low, sizeof(eight.low));
        std::memcpy(high, &eight.high, sizeof(eight.high));
      });
}

}  // namespace longspan::cuda
