#include "model/architecture.h"

#include <array>

#include "core/check.h"

namespace longspan {

const Architecture& find_architecture(std::string_view name) {
  const std::array known = {&llama_architecture(),     &mistral_architecture(),
                            &internlm2_architecture(), &internlm3_architecture(),
                            &qwen2_architecture(),     &qwen3_architecture()};
  std::string names;
  for (const Architecture* architecture : known) {
    if (architecture->name() == name) return *architecture;
    names += (names.empty() ? "" : ", ") + std::string(architecture->name());
  }
  throw Unsupported(
      message("config.json: architectures: expected one of ", names, ", got \"", name, "\""));
}

ConfigDialect config_dialect(std::string_view name) { return find_architecture(name).dialect(); }

}  // namespace longspan
