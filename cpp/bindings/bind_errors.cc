#include "bindings/bindings.h"
#include "longspan/error.h"

namespace longspan::bindings {
namespace py = pybind11;
namespace {

// The Python types, created once and kept for the life of the process. pybind11's own exception
// helper takes a single base; these have two, so that `except ValueError` works as well.
struct ErrorTypes {
  PyObject* base;
  PyObject* invalid_argument;
  PyObject* unsupported;
  PyObject* checkpoint;
  PyObject* context_too_long;
  PyObject* capacity;
  PyObject* backend_unavailable;
  PyObject* numerical;
  PyObject* parallel;
  PyObject* engine_closed;
};
ErrorTypes types;

PyObject* new_type(py::module_& m, const char* name, const char* doc, py::tuple bases) {
  const std::string qualified = std::string("longspan.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases.ptr(), nullptr);
  if (type == nullptr) throw py::error_already_set();
  m.attr(name) = py::handle(type);
  return type;
}

void raise_context_too_long(const ContextTooLong& error) {
  py::object instance = py::handle(types.context_too_long)(error.what());
  instance.attr("prompt_tokens") = error.prompt_tokens();
  instance.attr("session_len") = error.session_len();
  instance.attr("kv_capacity") = error.kv_capacity();
  PyErr_SetObject(types.context_too_long, instance.ptr());
}

void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const ContextTooLong& e) {
    raise_context_too_long(e);
  } catch (const InvalidArgument& e) {
    PyErr_SetString(types.invalid_argument, e.what());
  } catch (const Unsupported& e) {
    PyErr_SetString(types.unsupported, e.what());
  } catch (const CheckpointError& e) {
    PyErr_SetString(types.checkpoint, e.what());
  } catch (const CapacityError& e) {
    PyErr_SetString(types.capacity, e.what());
  } catch (const BackendUnavailable& e) {
    PyErr_SetString(types.backend_unavailable, e.what());
  } catch (const NumericalError& e) {
    PyErr_SetString(types.numerical, e.what());
  } catch (const ParallelError& e) {
    PyErr_SetString(types.parallel, e.what());
  } catch (const EngineClosed& e) {
    PyErr_SetString(types.engine_closed, e.what());
  } catch (const Error& e) {
    PyErr_SetString(types.base, e.what());
  }
}

}  // namespace

void bind_errors(py::module_& m) {
  const py::handle runtime_error(PyExc_RuntimeError), value_error(PyExc_ValueError);
  const py::handle not_implemented(PyExc_NotImplementedError), memory_error(PyExc_MemoryError);

  types.base = new_type(m, "LongspanError", "Base of every error of the engine.",
                        py::make_tuple(runtime_error));
  const py::handle base(types.base);
  types.invalid_argument =
      new_type(m, "InvalidArgument", "An option or argument is out of range or of the wrong form.",
               py::make_tuple(base, value_error));
  types.unsupported = new_type(m, "Unsupported", "Known, but this build does not do it.",
                               py::make_tuple(base, not_implemented));
  types.checkpoint =
      new_type(m, "CheckpointError", "A model file is missing, malformed, truncated or hostile.",
               py::make_tuple(base));
  types.context_too_long =
      new_type(m, "ContextTooLong",
               "The prompt does not fit the session. Carries prompt_tokens, session_len and "
               "kv_capacity, in tokens.",
               py::make_tuple(base, value_error));
  types.capacity =
      new_type(m, "CapacityError", "The engine or a request can never fit the memory there is.",
               py::make_tuple(base, memory_error));
  types.backend_unavailable = new_type(
      m, "BackendUnavailable", "The device or its library is absent.", py::make_tuple(base));
  types.numerical = new_type(m, "NumericalError", "A request produced NaN or infinite logits.",
                             py::make_tuple(base));
  types.parallel =
      new_type(m, "ParallelError", "Another rank of a tensor-parallel group failed or was lost.",
               py::make_tuple(base));
  types.engine_closed =
      new_type(m, "EngineClosed", "The engine was closed before the request could finish.",
               py::make_tuple(base));
  py::register_exception_translator(translate);
}

}  // namespace longspan::bindings
