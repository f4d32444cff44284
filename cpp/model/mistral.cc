#include "model/hf_layout.h"

namespace longspan {
namespace {

/// Mistral (Jiang et al. 2023): a Llama without biases. Where config.json says nothing of the
/// window, it is the first model's.
class Mistral final : public HfLayout {
 public:
  std::string_view name() const override { return "MistralForCausalLM"; }
  ConfigDialect dialect() const override { return {.sliding_window = 4096}; }
};

}  // namespace

const Architecture& mistral_architecture() {
  static const Mistral architecture;
  return architecture;
}

}  // namespace longspan
