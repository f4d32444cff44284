#pragma once

#include <map>
#include <string>
#include <utility>

#include "rope/rope_method.h"

namespace longspan::test {

/// Those of a model with heads of 64 dims, trained to 8192 tokens with a theta of 10000.
inline RopeParameters rope_parameters(const std::string& type,
                                      std::map<std::string, RopeValue> extra = {}) {
  RopeParameters p;
  p.type = type;
  p.theta = 10000.0;
  p.head_dim = p.rotary_dim = 64;
  p.native_length = 8192;
  p.extra = std::move(extra);
  return p;
}

inline RopeProfile rope_profile(const RopeParameters& p, int64_t length) {
  return make_rope_method(p)->profile(length);
}

}  // namespace longspan::test
