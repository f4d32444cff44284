#include "model/architecture.h"

namespace longspan {
namespace {

/// The Llama family (Touvron et al. 2023) as Hugging Face stores it: separate q, k, v and gate, up.
class Llama final : public Architecture {
 public:
  std::string_view name() const override { return "LlamaForCausalLM"; }

  OuterTensors outer(const ModelConfig& c, const Checkpoint& checkpoint) const override {
    OuterTensors t;
    t.embedding = checkpoint.tensor("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
    t.final_norm = checkpoint.tensor("model.norm.weight", 1, c.hidden_size);
    if (!c.tie_word_embeddings) {
      t.head = checkpoint.tensor("lm_head.weight", c.vocab_size, c.hidden_size);
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
    t.input_norm = vector("input_layernorm");
    t.q = linear("self_attn.q_proj", q_size, c.hidden_size, c.attention_bias);
    t.k = linear("self_attn.k_proj", kv_size, c.hidden_size, c.attention_bias);
    t.v = linear("self_attn.v_proj", kv_size, c.hidden_size, c.attention_bias);
    t.o = linear("self_attn.o_proj", c.hidden_size, q_size, c.attention_bias);
    t.post_attention_norm = vector("post_attention_layernorm");
    t.gate = linear("mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    t.up = linear("mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    t.down = linear("mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
    return t;
  }

  bool ignores(const ModelConfig& c, std::string_view tensor) const override {
    // Old exports carry the rotary frequencies, and tied models a copy of the embedding.
    return tensor.ends_with(".rotary_emb.inv_freq") ||
           (c.tie_word_embeddings && tensor == "lm_head.weight");
  }
};

}  // namespace

const Architecture& llama_architecture() {
  static const Llama architecture;
  return architecture;
}

}  // namespace longspan
