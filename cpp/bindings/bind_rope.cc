#include <pybind11/numpy.h>
#include <pybind11/operators.h>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "longspan/rope.h"

namespace longspan::bindings {

void bind_rope(py::module_& m) {
  py::class_<RopeProfile>(m, "RopeProfile", "The rotary embedding of one request. Immutable.")
      .def_static(
          "from_config",
          [](const py::dict& config, int64_t length, double rope_scaling_factor) {
            const auto text = py::module_::import("json").attr("dumps")(config).cast<std::string>();
            return rope_profile_from_config(text, length, rope_scaling_factor);
          },
          py::arg("config"), py::arg("length"), py::arg("rope_scaling_factor") = 0.0,
          "The profile of a model for a length in tokens. config: the content of a config.json. "
          "rope_scaling_factor: 0 leaves its method; >= 1 makes it dynamic NTK.")
      .def_readonly("type", &RopeProfile::type)
      .def_property_readonly("inv_freq",
                             [](const RopeProfile& self) {
                               return py::array_t<double>(self.inv_freq.size(),
                                                          self.inv_freq.data());
                             })
      .def_readonly("attention_factor", &RopeProfile::attention_factor)
      .def_readonly("base", &RopeProfile::base)
      .def_readonly("factor", &RopeProfile::factor)
      .def_readonly("length", &RopeProfile::length)
      .def_readonly("native_length", &RopeProfile::native_length)
      .def_readonly("logn_length", &RopeProfile::logn_length)
      .def(py::self == py::self)
      .def("__repr__", [](const py::handle& self) {
        return repr_of("RopeProfile",
                       {"type", "base", "factor", "length", "native_length", "attention_factor",
                        "logn_length"},
                       self);
      });
}

}  // namespace longspan::bindings
