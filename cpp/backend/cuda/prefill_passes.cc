#include "backend/cuda/prefill_passes.h"

#include <algorithm>

namespace longspan::cuda {
namespace {

constexpr int64_t kWorthwhilePanels = 4096;

int32_t heads_at_once(int64_t panels, int32_t num_kv_heads, int64_t capacity) {
  int32_t heads = num_kv_heads;
  while (heads > 1 && (num_kv_heads % heads != 0 || panels * heads > capacity)) --heads;
  return heads;
}

}  // namespace

int64_t workspace_panels(int64_t max_keys, int64_t max_seqs, int64_t num_kv_heads) {
  const int64_t longest = panels_of(max_keys);
  return std::max(longest, std::min(longest * max_seqs * num_kv_heads, kWorthwhilePanels));
}

std::vector<PrefillPass> plan_prefill_passes(std::span<const PrefillSeq> seqs, int32_t num_kv_heads,
                                             int64_t capacity) {
  std::vector<PrefillPass> passes;
  if (seqs.empty()) return passes;
  if (capacity == 0) return {{0, static_cast<int32_t>(seqs.size()), 0, num_kv_heads}};
  for (size_t s = 0; s < seqs.size(); ++s) {
    const auto panels = static_cast<int32_t>(panels_of(seqs[s].keys(seqs[s].num_rows)));
    if (passes.empty() || passes.back().num_panels + panels > capacity) {
      passes.push_back({static_cast<int32_t>(s), 0, 0, 0});
    }
    ++passes.back().num_seqs;
    passes.back().num_panels += panels;
  }
  for (PrefillPass& pass : passes) {
    pass.num_kv_heads = heads_at_once(pass.num_panels, num_kv_heads, capacity);
  }
  return passes;
}

int64_t rows_of_a_round(bool has_workspace, int64_t num_heads, int64_t num_kv_heads,
                        int64_t num_sms) {
  const int64_t heads = has_workspace ? num_heads / num_kv_heads : num_heads;
  return std::max<int64_t>(num_sms / heads, 1) * kPrefillRows;
}

}  // namespace longspan::cuda
