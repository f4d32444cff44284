#pragma once

#include <cstdint>
#include <string>
#include <variant>

#include "longspan/rope.h"

namespace longspan::bindings {

/// A RopeLength in Python: the name of its policy, or tokens.
using RopeLengthValue = std::variant<std::string, int64_t>;
inline constexpr const char* kRopeLengthExpected =
    "\"request\", \"prompt\", \"session\", \"bucket\" or an int of tokens >= 1";

RopeLengthValue rope_length_to_python(const RopeLength& length);

/// `what` names the option. Throws InvalidArgument.
RopeLength rope_length_from_python(const RopeLengthValue& value, const std::string& what);

}  // namespace longspan::bindings
