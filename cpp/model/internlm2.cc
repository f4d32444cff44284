#include "model/architecture.h"

namespace longspan {
namespace {

WeightView rows_of(const WeightView& tensor, int64_t begin, int64_t count) {
  WeightView rows = tensor;
  rows.data = tensor.row(begin);
  rows.rows = count;
  return rows;
}

WeightView cols_of(const WeightView& vector, int64_t begin, int64_t count) {
  WeightView cols = vector;
  cols.data = static_cast<const char*>(vector.data) + begin * size_of(vector.dtype);
  cols.cols = count;
  cols.stride = count;
  return cols;
}

/// InternLM 2 and 2.5 (Cai et al. 2024): names of its own, and q, k and v in one tensor by KV head:
/// each has its group's query heads, then k, then v, head_dim rows a head.
class InternLm2 final : public Architecture {
 public:
  std::string_view name() const override { return "InternLM2ForCausalLM"; }

  ConfigDialect dialect() const override {
    return {.qkv_bias = {{"bias"}, true}, .o_bias = {{"bias"}, true}};
  }

  OuterTensors outer(const ModelConfig& c, const Checkpoint& checkpoint) const override {
    OuterTensors t;
    t.embedding = checkpoint.tensor("model.tok_embeddings.weight", c.vocab_size, c.hidden_size);
    t.final_norm = checkpoint.tensor("model.norm.weight", 1, c.hidden_size);
    if (!c.tie_word_embeddings) {
      t.head = checkpoint.tensor("output.weight", c.vocab_size, c.hidden_size);
    }
    return t;
  }

  LayerTensors layer(const ModelConfig& c, const Checkpoint& checkpoint,
                     int64_t index) const override {
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    const auto vector = [&](const std::string& name) {
      return checkpoint.tensor(prefix + name + ".weight", 1, c.hidden_size);
    };
    const auto linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
      LinearTensors t;
      t.parts = {checkpoint.tensor(prefix + name + ".weight", out, in)};
      if (bias) t.bias = {checkpoint.tensor(prefix + name + ".bias", 1, out)};
      return t;
    };
    const int64_t q_size = c.num_heads * c.head_dim;
    const int64_t kv_size = c.num_kv_heads * c.head_dim;
    LayerTensors t;
    t.input_norm = vector("attention_norm");
    unpack(c, linear("attention.wqkv", q_size + 2 * kv_size, c.hidden_size, c.qkv_bias), t);
    t.o = linear("attention.wo", c.hidden_size, q_size, c.o_bias);
    t.post_attention_norm = vector("ffn_norm");
    t.gate = linear("feed_forward.w1", c.intermediate_size, c.hidden_size, c.mlp_bias);
    t.up = linear("feed_forward.w3", c.intermediate_size, c.hidden_size, c.mlp_bias);
    t.down = linear("feed_forward.w2", c.hidden_size, c.intermediate_size, c.mlp_bias);
    return t;
  }

  bool ignores(const ModelConfig& c, std::string_view tensor) const override {
    return tensor.ends_with(".rotary_emb.inv_freq") ||
           (c.tie_word_embeddings && tensor == "output.weight");
  }

 private:
  static void unpack(const ModelConfig& c, const LinearTensors& wqkv, LayerTensors& t) {
    const int64_t group = c.num_heads / c.num_kv_heads;
    const auto take = [&](LinearTensors& out, int64_t head, int64_t heads) {
      const int64_t begin = head * c.head_dim;
      const int64_t rows = heads * c.head_dim;
      out.parts.push_back(rows_of(wqkv.parts[0], begin, rows));
      if (!wqkv.bias.empty()) out.bias.push_back(cols_of(wqkv.bias[0], begin, rows));
    };
    for (int64_t kv_head = 0; kv_head < c.num_kv_heads; ++kv_head) {
      const int64_t first = kv_head * (group + 2);
      take(t.q, first, group);
      take(t.k, first + group, 1);
      take(t.v, first + group + 1, 1);
    }
  }
};

}  // namespace

const Architecture& internlm2_architecture() {
  static const InternLm2 architecture;
  return architecture;
}

}  // namespace longspan
