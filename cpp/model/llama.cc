#include "model/hf_layout.h"

namespace longspan {
namespace {

/// Llama (Touvron et al. 2023).
class Llama final : public HfLayout {
 public:
  std::string_view name() const override { return "LlamaForCausalLM"; }
  ConfigDialect dialect() const override {
    return {.qkv_bias = {{"attention_bias"}},
            .o_bias = {{"attention_bias"}},
            .mlp_bias = {{"mlp_bias"}}};
  }
};

}  // namespace

const Architecture& llama_architecture() {
  static const Llama architecture;
  return architecture;
}

}  // namespace longspan
