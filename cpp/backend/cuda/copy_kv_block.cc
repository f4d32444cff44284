#include "backend/cuda/copy_kv_block.h"

#include "backend/cuda/kv_layout.h"

namespace longspan::cuda {

void copy_kv_block(const KvCache& cache, int32_t from, int32_t to, int64_t tokens,
                   cudaStream_t stream) {
  const KvLayout layout = KvLayout::of(cache.shape, cache.pool.data());
  cudaMemcpyAsync(layout.key_tile(to, 0, 0), layout.key_tile(from, 0, 0),
                  static_cast<size_t>(layout.block_bytes), cudaMemcpyDeviceToDevice, stream);
  const int64_t row = tokens % kPanelTokens;
  if (row == 0) return;
  // The values after the last token, in the panels that hold it, are zero, as rotate_append leaves
  // them; every head of every layer at once.
  constexpr int64_t kRowBytes = kPanelBytes / kPanelTokens;
  const int64_t first_panel = tokens / kPanelTokens * layout.panels_per_token;
  char* values = layout.key_tile(to, 0, 0) + layout.tile_bytes;
  for (int64_t panel = first_panel; panel < first_panel + layout.panels_per_token; ++panel) {
    cudaMemset2DAsync(
        values + panel * kPanelBytes + row * kRowBytes, static_cast<size_t>(2 * layout.tile_bytes),
        0, static_cast<size_t>((kPanelTokens - row) * kRowBytes),
        static_cast<size_t>(cache.shape.num_layers * cache.shape.num_kv_heads), stream);
  }
}

}  // namespace longspan::cuda
