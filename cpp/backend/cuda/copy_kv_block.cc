#include "backend/cuda/copy_kv_block.h"

#include "backend/cuda/kv_layout.h"

namespace longspan::cuda {

void copy_kv_block(const KvCache& cache, int32_t from, int32_t to, int64_t tokens,
                   cudaStream_t stream) {
  const KvLayout layout = KvLayout::of(cache.shape, cache.pool.data());
  cudaMemcpyAsync(layout.key_tile(to, 0, 0), layout.key_tile(from, 0, 0),
                  static_cast<size_t>(layout.block_bytes), cudaMemcpyDeviceToDevice, stream);
  const KvTile& values = layout.value;
  const int64_t row = tokens % kPanelTokens;
  if (row == 0 || values.element != KvElement::kNative) return;
  // The values after the last token, in the panels that hold it, are zero, as rotate_append leaves
  // them; every head of every layer at once.
  const int64_t first_panel = tokens / kPanelTokens * values.panels;
  char* tile = layout.key_tile(to, 0, 0) + values.offset;
  for (int64_t panel = first_panel; panel < first_panel + values.panels; ++panel) {
    cudaMemset2DAsync(tile + panel * values.panel_bytes() + row * values.row_bytes,
                      static_cast<size_t>(layout.head_bytes), 0,
                      static_cast<size_t>((kPanelTokens - row) * values.row_bytes),
                      static_cast<size_t>(cache.shape.num_layers * cache.shape.num_kv_heads),
                      stream);
  }
}

}  // namespace longspan::cuda
