#pragma once

#include <sstream>
#include <string>

#include "longspan/error.h"

namespace longspan {

/// Concatenates anything that prints: message("expected ", 3, ", got ", 4).
template <class... Args>
std::string message(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

/// Throws E with the message unless the condition holds.
template <class E, class... Args>
void require(bool condition, const Args&... args) {
  if (!condition) throw E(message(args...));
}

}  // namespace longspan
