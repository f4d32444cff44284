#pragma once

#include <pybind11/pybind11.h>

namespace longspan::bindings {

// Each adds its part of longspan._core; python/longspan/_core.pyi documents the result.
void bind_errors(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_config(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_context(pybind11::module_& m);
void bind_rendezvous(pybind11::module_& m);
void bind_request(pybind11::module_& m);
void bind_engine(pybind11::module_& m);

}  // namespace longspan::bindings
