#include "model/shard.h"

#include <algorithm>

namespace longspan {
namespace {

WeightView cut(const WeightView& view, Share rows, Share cols) {
  WeightView out = view;
  out.data = static_cast<const char*>(view.row(rows.begin)) + cols.begin * size_of(view.dtype);
  out.rows = rows.size();
  out.cols = cols.size();
  return out;
}

/// KV heads of a rank: its own, or the one that its query heads share with other ranks.
Share kv_share(int64_t kv_heads, int rank, int size) {
  if (kv_heads >= size) return share_of(kv_heads, rank, size);
  const int64_t head = rank * kv_heads / size;
  return {head, head + 1};
}

/// Whether a group of tp ranks with cp context shards can run the model.
bool can_split(const ModelConfig& c, int tp, int cp) {
  if (tp < 1 || tp > kMaxTp || cp < 1 || tp % cp != 0) return false;
  const int heads = tp / cp;  // groups of ranks with the same ones
  const bool kv_split = c.num_kv_heads % heads == 0 || heads % c.num_kv_heads == 0;
  return c.num_heads % heads == 0 && kv_split && c.intermediate_size % tp == 0 &&
         c.vocab_size >= tp;
}

}  // namespace

Shard::Shard(const ModelConfig& c, int rank, int size, int cp_size)
    : q_heads(share_of(c.num_heads, rank / cp_size, size / cp_size)),
      kv_heads(kv_share(c.num_kv_heads, rank / cp_size, size / cp_size)),
      inner(share_of(c.intermediate_size, rank, size)),
      tokens(share_of(c.vocab_size, rank, size)),
      first(rank == 0),
      tp_rank(rank),
      tp_size(size),
      context_rank(rank % cp_size),
      context_size(cp_size) {}

std::vector<int> possible_tp(const ModelConfig& c, int cp_size) {
  std::vector<int> sizes;
  for (int tp = 1; tp <= kMaxTp; ++tp) {
    if (can_split(c, tp, cp_size)) sizes.push_back(tp);
  }
  return sizes;
}

std::vector<int> possible_cp(const ModelConfig& c, int tp_size) {
  std::vector<int> sizes;
  for (int cp = 1; cp <= tp_size; ++cp) {
    if (can_split(c, tp_size, cp)) sizes.push_back(cp);
  }
  return sizes;
}

LinearTensors slice_rows(const LinearTensors& tensors, Share rows) {
  LinearTensors out;
  int64_t start = 0;  // first row of the part at hand
  for (size_t i = 0; i < tensors.parts.size(); ++i) {
    const WeightView& part = tensors.parts[i];
    const Share here = {std::max(rows.begin - start, int64_t{0}),
                        std::min(rows.end - start, part.rows)};
    if (here.begin < here.end) {
      out.parts.push_back(cut(part, here, {0, part.cols}));
      if (!tensors.bias.empty()) out.bias.push_back(cut(tensors.bias[i], {0, 1}, here));
    }
    start += part.rows;
  }
  return out;
}

LinearTensors slice_cols(const LinearTensors& tensors, Share cols, bool keep_bias) {
  LinearTensors out;
  for (const WeightView& part : tensors.parts) out.parts.push_back(cut(part, {0, part.rows}, cols));
  if (keep_bias) out.bias = tensors.bias;
  return out;
}

LayerTensors slice(const LayerTensors& layer, const ModelConfig& c, const Shard& shard) {
  const Share q = shard.q_heads.times(c.head_dim);
  const Share kv = shard.kv_heads.times(c.head_dim);
  LayerTensors out = layer;
  out.q = slice_rows(layer.q, q);
  out.k = slice_rows(layer.k, kv);
  out.v = slice_rows(layer.v, kv);
  out.o = slice_cols(layer.o, q, shard.first);
  out.gate = slice_rows(layer.gate, shard.inner);
  out.up = slice_rows(layer.up, shard.inner);
  out.down = slice_cols(layer.down, shard.inner, shard.first);
  return out;
}

OuterTensors slice(const OuterTensors& outer, const Shard& shard) {
  OuterTensors out = outer;
  out.embedding = cut(outer.embedding, shard.tokens, {0, outer.embedding.cols});
  if (outer.head.data != nullptr) {
    out.head = cut(outer.head, shard.tokens, {0, outer.head.cols});
  }
  return out;
}

}  // namespace longspan
