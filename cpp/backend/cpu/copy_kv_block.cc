#include "backend/cpu/copy_kv_block.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/kv_tiles.h"

namespace longspan::cpu {
namespace {

/// Zeroes the values of keys [first_key, kKeyTile) of a tile: they count as not yet appended.
template <class T>
void zero_values(char* v_tile, int64_t v_tile_bytes, int64_t first_key) {
  T* values = reinterpret_cast<T*>(v_tile);
  constexpr int64_t kPanel = padded_k<T>(kKeyTile) * kPanelCols;
  const int64_t panels = v_tile_bytes / static_cast<int64_t>(sizeof(T)) / kPanel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t key = first_key; key < kKeyTile; ++key) {
      for (int64_t col = 0; col < kPanelCols; ++col) {
        values[panel * kPanel + index_in_panel<T>(key, col)] = T{0};
      }
    }
  }
}

/// The same where codes are held.
void zero_parameters(char* v_tile, const KvTile& tile, int64_t first_key) {
  auto* parameters = reinterpret_cast<uint16_t*>(v_tile + tile.code_bytes);
  const int64_t rows = tile.parameter_bytes() / (2 * kKeyTile);
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(parameters + row * kKeyTile + first_key, parameters + (row + 1) * kKeyTile,
              uint16_t{0});
  }
}

}  // namespace

void copy_kv_block(ThreadPool& pool, const KvCache& cache, DType dtype, int32_t from, int32_t to,
                   int64_t tokens) {
  const KvTiles tiles(cache.shape, dtype);
  const int64_t used_tiles = (tokens + kKeyTile - 1) / kKeyTile;
  const auto copy = [&](int64_t index, int /*thread*/) {
    const int64_t layer = index / cache.shape.num_kv_heads;
    const int64_t head = index % cache.shape.num_kv_heads;
    char* data = cache.pool.as<char>();
    for (int64_t tile = 0; tile < used_tiles; ++tile) {
      std::memcpy(data + tiles.k_offset(&to, tile, layer, head),
                  data + tiles.k_offset(&from, tile, layer, head),
                  static_cast<size_t>(tiles.k().bytes));
      char* values = data + tiles.v_offset(&to, tile, layer, head);
      std::memcpy(values, data + tiles.v_offset(&from, tile, layer, head),
                  static_cast<size_t>(tiles.v().bytes));
      const int64_t left = tokens - tile * kKeyTile;
      if (left >= kKeyTile) continue;
      if (tiles.v().element != KvElement::kNative) {
        zero_parameters(values, tiles.v(), left);
      } else if (dtype == DType::kF32) {
        zero_values<float>(values, tiles.v().bytes, left);
      } else {
        zero_values<bf16_t>(values, tiles.v().bytes, left);
      }
    }
  };
  pool.parallel_for(cache.shape.num_layers * cache.shape.num_kv_heads, copy);
}

}  // namespace longspan::cpu
