#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/error.h"

namespace longspan::bindings {

namespace py = pybind11;

/// "Type(a=1, b='x')" from the named attributes of self.
inline std::string repr_of(const char* type, const std::vector<std::string>& names,
                           const py::handle& self) {
  std::string text = std::string(type) + "(";
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += ", ";
    text += names[i] + "=" + py::repr(self.attr(names[i].c_str())).cast<std::string>();
  }
  return text + ")";
}

/// Converts an option, strictly: no truthiness for bool. `where` and `expected` word the error.
/// Throws InvalidArgument for an int out of range and TypeError for a value of another kind.
template <typename Value>
Value convert_option(const std::string& where, const char* expected, const py::handle& value) {
  if (!std::is_same_v<Value, bool> || py::isinstance<py::bool_>(value)) {
    try {
      return value.cast<Value>();
    } catch (const py::cast_error&) {
    }
  }
  const std::string message =
      where + ": expected " + expected + ", got " + py::repr(value).cast<std::string>();
  if (py::isinstance<py::int_>(value)) throw InvalidArgument(message);
  throw py::type_error(message);
}

/// Binds a struct of options: every field is a keyword of the constructor and an attribute. A
/// keyword that is no field is a TypeError, as for any Python function.
template <typename T>
class OptionsClass {
 public:
  OptionsClass(py::module_& m, const char* name, const char* doc)
      : name_(name), class_(m, name, doc) {
    class_.def(py::init([fields = fields_, name](const py::kwargs& options) {
      T result;
      for (const auto& [key, value] : options) set_option(*fields, name, result, key, value);
      return result;
    }));
    class_.def(py::init(&from_native_method));
    py::implicitly_convertible<py::object, T>();
    class_.def("__repr__", [fields = fields_, name](const py::handle& self) {
      return repr_of(name, fields->names, self);
    });
  }

  /// `expected` completes "expected ..., got ..." when a value has the wrong type or range.
  template <typename Value>
  OptionsClass& field(const char* name, Value T::* member, const char* expected) {
    return property<Value>(
        name, expected, [member](const T& self) { return self.*member; },
        [member](T& self, Value value) { self.*member = std::move(value); });
  }

  template <typename Value, typename Get, typename Set>
  OptionsClass& property(const char* name, const char* expected, Get get, Set set) {
    const std::string where = std::string(name_) + "." + name;
    auto convert_and_set = [where, expected, set](T& self, const py::handle& value) {
      set(self, convert_option<Value>(where, expected, value));
    };
    fields_->names.push_back(name);
    fields_->setters.push_back(convert_and_set);
    class_.def_property(name, get, convert_and_set);
    return *this;
  }

 private:
  /// The dataclasses of longspan.config stand for the options their native() returns, wherever
  /// these are expected.
  static T from_native_method(const py::object& options) {
    if (!py::hasattr(options, "native")) {
      throw py::type_error("expected options, got " + py::repr(options).cast<std::string>());
    }
    return options.attr("native")().template cast<T>();
  }

  struct Fields {
    std::vector<std::string> names;
    std::vector<std::function<void(T&, const py::handle&)>> setters;  // parallel to names
  };

  static void set_option(const Fields& fields, const char* type, T& target, const py::handle& key,
                         const py::handle& value) {
    const auto name = key.cast<std::string>();
    std::string known;
    for (size_t i = 0; i < fields.names.size(); ++i) {
      if (fields.names[i] == name) return fields.setters[i](target, value);
      known += (i > 0 ? ", " : "") + fields.names[i];
    }
    throw py::type_error(std::string(type) + ": expected one of " + known + ", got '" + name + "'");
  }

  const char* name_;
  std::shared_ptr<Fields> fields_ = std::make_shared<Fields>();
  py::class_<T> class_;
};

/// Binds a struct of results: attributes that cannot be set, and a repr that shows them.
template <typename T>
class ResultClass {
 public:
  ResultClass(py::module_& m, const char* name, const char* doc) : class_(m, name, doc) {
    class_.def("__repr__", [names = names_, name](const py::handle& self) {
      return repr_of(name, *names, self);
    });
  }

  template <typename Value>
  ResultClass& field(const char* name, Value T::* member) {
    class_.def_readonly(name, member);
    names_->push_back(name);
    return *this;
  }

  template <typename Get>
  ResultClass& property(const char* name, Get get) {
    class_.def_property_readonly(name, get);
    names_->push_back(name);
    return *this;
  }

 private:
  std::shared_ptr<std::vector<std::string>> names_ = std::make_shared<std::vector<std::string>>();
  py::class_<T> class_;
};

}  // namespace longspan::bindings
