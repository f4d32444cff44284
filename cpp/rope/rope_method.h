#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
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
  int64_t head_dim = 0;                    ///< >= rotary_dim
  int64_t rotary_dim = 0;                  ///< dims of a head that rotate, even, > 0
  int64_t native_length = 0;               ///< max_position_embeddings, tokens, > 0
  bool logn = false;                       ///< see RopeProfile::logn_length
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
  /// Its parameters in a few words: "factor 2.5 past 8192 tokens".
  virtual std::string describe() const = 0;
};

/// Throws Unsupported for an unknown type or a key the method does not consume, listing what is
/// supported, and InvalidArgument for a value out of range.
std::unique_ptr<RopeMethod> make_rope_method(const RopeParameters& parameters);

/// Whether a method of that type reads that key of RopeParameters::extra.
bool rope_type_consumes(std::string_view type, std::string_view key);

/// The resolved RoPE in one line: type, theta, the method's parameters, native length, and what
/// part of a head turns where that is not the whole.
std::string describe_rope(const RopeParameters& parameters, const RopeMethod& method);

}  // namespace longspan
