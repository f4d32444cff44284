#include "model/hf_layout.h"

namespace longspan {

OuterTensors HfLayout::outer(const ModelConfig& c, const Checkpoint& checkpoint) const {
  OuterTensors t;
  t.embedding = checkpoint.tensor("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  t.final_norm = checkpoint.tensor("model.norm.weight", 1, c.hidden_size);
  if (!c.tie_word_embeddings) {
    t.head = checkpoint.tensor("lm_head.weight", c.vocab_size, c.hidden_size);
  }
  return t;
}

LayerTensors HfLayout::layer(const ModelConfig& c, const Checkpoint& checkpoint,
                             int64_t index) const {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const auto vector = [&](const std::string& name, int64_t size) {
    return checkpoint.tensor(prefix + name + ".weight", 1, size);
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
  t.input_norm = vector("input_layernorm", c.hidden_size);
  t.q = linear("self_attn.q_proj", q_size, c.hidden_size, c.qkv_bias);
  t.k = linear("self_attn.k_proj", kv_size, c.hidden_size, c.qkv_bias);
  t.v = linear("self_attn.v_proj", kv_size, c.hidden_size, c.qkv_bias);
  if (c.qk_norm) {
    t.q_norm = vector("self_attn.q_norm", c.head_dim);
    t.k_norm = vector("self_attn.k_norm", c.head_dim);
  }
  t.o = linear("self_attn.o_proj", c.hidden_size, q_size, c.o_bias);
  t.post_attention_norm = vector("post_attention_layernorm", c.hidden_size);
  t.gate = linear("mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
  t.up = linear("mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
  t.down = linear("mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
  return t;
}

bool HfLayout::ignores(const ModelConfig& c, std::string_view tensor) const {
  // Old exports carry the rotary frequencies, and tied models a copy of the embedding.
  return tensor.ends_with(".rotary_emb.inv_freq") ||
         (c.tie_word_embeddings && tensor == "lm_head.weight");
}

}  // namespace longspan
