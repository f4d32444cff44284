#include <pybind11/functional.h>

#include <functional>
#include <string>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "longspan/rendezvous.h"

namespace longspan::bindings {

void bind_rendezvous(py::module_& m) {
  ResultClass<RendezvousStep>(m, "RendezvousStep", "One step on which ranks come together.")
      .field("name", &RendezvousStep::name)
      .field("ok", &RendezvousStep::ok)
      .field("found", &RendezvousStep::found)
      .field("seconds", &RendezvousStep::seconds);
  ResultClass<Rendezvous>(m, "Rendezvous", "How the ranks of a launcher came together.")
      .field("rank", &Rendezvous::rank)
      .field("size", &Rendezvous::size)
      .field("steps", &Rendezvous::steps)
      .property("ok", &Rendezvous::ok);
  m.def("check_rendezvous", &check_rendezvous, py::arg("device") = "auto",
        py::arg("timeout_s") = 60, py::arg("begins") = py::none(),
        py::call_guard<py::gil_scoped_release>(),
        "Does what the processes of a launcher do before they are the ranks of an engine, without "
        "a model; begins(rank, step) is called before each step.");
}

}  // namespace longspan::bindings
