#include "model/hf_layout.h"

namespace longspan {
namespace {

/// Qwen 3 (Yang et al. 2025): every head of q and k is normed before it is rotated.
class Qwen3 final : public HfLayout {
 public:
  std::string_view name() const override { return "Qwen3ForCausalLM"; }
  ConfigDialect dialect() const override {
    return {.qkv_bias = {{"attention_bias"}},
            .o_bias = {{"attention_bias"}},
            .qk_norm = true,
            .use_sliding_window = false};
  }
};

}  // namespace

const Architecture& qwen3_architecture() {
  static const Qwen3 architecture;
  return architecture;
}

}  // namespace longspan
