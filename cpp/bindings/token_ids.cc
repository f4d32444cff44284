#include "bindings/token_ids.h"

#include <pybind11/numpy.h>

#include <limits>
#include <string>

#include "longspan/error.h"

namespace longspan::bindings {
namespace py = pybind11;
namespace {

[[noreturn]] void refuse(const char* what, const std::string& got) {
  throw InvalidArgument(std::string(what) + ": expected a 1-D sequence of integers, got " + got);
}

/// A 1-D int64 array; an empty list, which numpy makes float64, is accepted too.
py::array_t<int64_t> to_int64_array(const py::handle& values, const char* what) {
  py::array array;
  try {
    array = py::module_::import("numpy").attr("asarray")(values);
  } catch (const py::error_already_set& error) {  // ragged lists, tensors on another device
    if (!error.matches(PyExc_Exception)) throw;   // KeyboardInterrupt
    refuse(what, error.what());
  }
  if (array.ndim() != 1) refuse(what, "shape " + py::str(array.attr("shape")).cast<std::string>());
  const char kind = array.dtype().kind();
  if (array.size() > 0 && kind != 'i' && kind != 'u') {
    refuse(what, "dtype " + py::str(array.dtype()).cast<std::string>());
  }
  return py::array_t<int64_t>(array);
}

template <typename T>
std::vector<T> to_integers(const py::handle& values, const char* what) {
  const py::array_t<int64_t> array = to_int64_array(values, what);
  const auto view = array.unchecked<1>();
  std::vector<T> result(view.shape(0));
  for (py::ssize_t i = 0; i < view.shape(0); ++i) {
    const int64_t value = view(i);
    // A uint64 beyond int64 arrives negative and is refused with the rest.
    if (value < 0 || value > std::numeric_limits<T>::max()) {
      throw InvalidArgument(std::string(what) + ": expected integers in [0, " +
                            std::to_string(std::numeric_limits<T>::max()) + "], got " +
                            std::to_string(value) + " at index " + std::to_string(i));
    }
    result[i] = static_cast<T>(value);
  }
  return result;
}

}  // namespace

std::vector<int32_t> to_token_ids(const py::handle& values, const char* what) {
  return to_integers<int32_t>(values, what);
}

std::vector<int64_t> to_positions(const py::handle& values, const char* what) {
  return to_integers<int64_t>(values, what);
}

}  // namespace longspan::bindings
