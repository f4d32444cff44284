#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native engine. Mirrors cpp/include/longspan.";
  using namespace longspan::bindings;
  bind_errors(m);
  bind_rope(m);
  bind_config(m);
  bind_plan(m);
  bind_rendezvous(m);
  bind_request(m);
  bind_context(m);
  bind_engine(m);
}
