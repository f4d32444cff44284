#include <pybind11/numpy.h>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "longspan/context.h"

namespace longspan::bindings {

void bind_context(py::module_& m) {
  ResultClass<Context>(m, "Context", "Tokens whose keys and values are in a file.")
      .property("token_ids",
                [](const Context& self) {
                  return py::array_t<int32_t>(std::ssize(self.token_ids), self.token_ids.data());
                })
      .field("rope_profile", &Context::rope_profile)
      .field("file_bytes", &Context::file_bytes);

  ResultClass<ContextProgress>(m, "ContextProgress",
                               "How far saving or loading a context has come, in tokens.")
      .field("computed", &ContextProgress::computed)
      .field("moved", &ContextProgress::moved)
      .field("total", &ContextProgress::total);
}

}  // namespace longspan::bindings
