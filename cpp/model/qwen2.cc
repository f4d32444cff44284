#include "model/hf_layout.h"

namespace longspan {
namespace {

/// Qwen 2 and 2.5 (Yang et al. 2024): a Llama with biases on q, k and v alone.
class Qwen2 final : public HfLayout {
 public:
  std::string_view name() const override { return "Qwen2ForCausalLM"; }
  ConfigDialect dialect() const override {
    return {.qkv_bias = {.fallback = true}, .use_sliding_window = false};
  }
};

}  // namespace

const Architecture& qwen2_architecture() {
  static const Qwen2 architecture;
  return architecture;
}

}  // namespace longspan
