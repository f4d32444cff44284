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

}  // namespace

Shard::Shard(const ModelConfig& c, int tp_rank, int tp_size)
    : q_heads(share_of(c.num_heads, tp_rank, tp_size)),
      kv_heads(kv_share(c.num_kv_heads, tp_rank, tp_size)),
      inner(share_of(c.intermediate_size, tp_rank, tp_size)),
      tokens(share_of(c.vocab_size, tp_rank, tp_size)),
      first(tp_rank == 0) {}

std::vector<int> possible_tp(const ModelConfig& c) {
  std::vector<int> sizes;
  for (int size = 1; size <= kMaxTp; ++size) {
    const bool kv_split = c.num_kv_heads % size == 0 || size % c.num_kv_heads == 0;
    if (c.num_heads % size == 0 && kv_split && c.intermediate_size % size == 0 &&
        c.vocab_size >= size) {
      sizes.push_back(size);
    }
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
