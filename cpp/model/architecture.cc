#include "model/architecture.h"

#include <array>

#include "core/check.h"

namespace longspan {

const Architecture& find_architecture(std::string_view name) {
  const std::array known = {&llama_architecture()};
  std::string names;
  for (const Architecture* architecture : known) {
    if (architecture->name() == name) return *architecture;
    names += (names.empty() ? "" : ", ") + std::string(architecture->name());
  }
  throw Unsupported(
      message("config.json: architectures: expected one of ", names, ", got \"", name, "\""));
}

}  // namespace longspan
