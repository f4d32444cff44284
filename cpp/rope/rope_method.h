#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "longspan/rope.h"

namespace longspan {

/// One value of a config's rope dictionary, free of any JSON library.
using RopeValue = std::variant<std::nullptr_t, bool, double, std::string, std::vector<double>>;

/// What a model's config says of its rotary embedding.
struct RopeParameters {
  std::string type = "default";
  double theta = 10000.0;                  ///< base of the angles, > 0
  int64_t rotary_dim = 0;                  ///< dims of a head that rotate, even, > 0
  int64_t native_length = 0;               ///< max_position_embeddings, tokens, > 0
  std::map<std::string, RopeValue> extra;  ///< every other key of the dictionary
};

/// A way to scale rotary frequencies with length. Pure host maths.
class RopeMethod {
 public:
  virtual ~RopeMethod() = default;
  /// The profile for a length in tokens, >= 1. Thread-safe.
  virtual RopeProfile profile(int64_t length) const = 0;
  /// True when profile() differs between lengths beyond the `length` field.
  virtual bool depends_on_length() const = 0;
};

/// Throws Unsupported for an unknown type or a key the method does not consume, listing what is
/// supported, and InvalidArgument for a value out of range.
std::unique_ptr<RopeMethod> make_rope_method(const RopeParameters& parameters);

}  // namespace longspan
