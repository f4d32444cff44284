#include "bindings/rope_length.h"

#include "longspan/error.h"

namespace longspan::bindings {

RopeLengthValue rope_length_to_python(const RopeLength& length) {
  switch (length.policy) {
    case RopeLengthPolicy::kRequest:
      return "request";
    case RopeLengthPolicy::kPrompt:
      return "prompt";
    case RopeLengthPolicy::kSession:
      return "session";
    case RopeLengthPolicy::kBucket:
      return "bucket";
    case RopeLengthPolicy::kFixed:
      return length.tokens;
  }
  throw InvalidArgument("rope_length: expected a known policy");
}

RopeLength rope_length_from_python(const RopeLengthValue& value, const std::string& what) {
  if (const auto* tokens = std::get_if<int64_t>(&value)) {
    if (*tokens >= 1) return {RopeLengthPolicy::kFixed, *tokens};
    throw InvalidArgument(what + ": expected " + kRopeLengthExpected + ", got " +
                          std::to_string(*tokens));
  }
  const auto& name = std::get<std::string>(value);
  for (auto policy : {RopeLengthPolicy::kRequest, RopeLengthPolicy::kPrompt,
                      RopeLengthPolicy::kSession, RopeLengthPolicy::kBucket}) {
    if (rope_length_to_python({policy}) == RopeLengthValue(name)) return {policy};
  }
  throw InvalidArgument(what + ": expected " + kRopeLengthExpected + ", got '" + name + "'");
}

}  // namespace longspan::bindings
