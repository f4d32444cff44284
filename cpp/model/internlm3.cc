#include "model/hf_layout.h"

namespace longspan {
namespace {

/// InternLM 3 (Shanghai AI Laboratory 2025): a Llama whose config.json names the biases of q, k and
/// v and those of o and the MLP; transformers writes Llama's names for them.
class InternLm3 final : public HfLayout {
 public:
  std::string_view name() const override { return "InternLM3ForCausalLM"; }
  ConfigDialect dialect() const override {
    return {.qkv_bias = {{"qkv_bias", "attention_bias"}},
            .o_bias = {{"bias", "mlp_bias"}},
            .mlp_bias = {{"bias", "mlp_bias"}}};
  }
};

}  // namespace

const Architecture& internlm3_architecture() {
  static const InternLm3 architecture;
  return architecture;
}

}  // namespace longspan
