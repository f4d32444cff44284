#include "rope/rope_method.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "rope/methods.h"
#include "rope/parameters.h"

namespace longspan {
namespace rope {
namespace {

std::string join(std::vector<std::string_view> names) {
  std::sort(names.begin(), names.end());
  std::string all;
  for (const std::string_view name : names) {
    if (!all.empty()) all += ", ";
    all += name;
  }
  return all;
}

std::vector<MethodEntry> all_methods() {
  return {default_method(),  dynamic_ntk_method(),  linear_method(), llama3_method(),
          longrope_method(), proportional_method(), yarn_method()};
}

bool consumes(const MethodEntry& method, std::string_view key) {
  return std::find(method.keys.begin(), method.keys.end(), key) != method.keys.end();
}

void check_common(const RopeParameters& p) {
  require<InvalidArgument>(p.theta >= 1.0 && p.theta <= kMaxTheta,
                           "rope_theta: expected a number in [1, 1e18], got ", p.theta);
  require<InvalidArgument>(p.rotary_dim >= 2 && p.rotary_dim % 2 == 0,
                           "rotary dimension: expected an even integer >= 2, got ", p.rotary_dim);
  require<InvalidArgument>(p.head_dim >= p.rotary_dim,
                           "rotary dimension: expected at most head_dim (", p.head_dim, "), got ",
                           p.rotary_dim);
  require<InvalidArgument>(p.native_length >= (p.logn ? 2 : 1),
                           "max_position_embeddings: expected an integer >= ", p.logn ? 2 : 1,
                           ", got ", p.native_length);
}

void check_keys(const MethodEntry& method, const RopeParameters& p) {
  for (const auto& [key, value] : p.extra) {
    if (consumes(method, key)) continue;
    std::vector<std::string_view> known = method.keys;
    known.insert(known.end(), {"partial_rotary_factor", "rope_theta", "rope_type"});
    throw Unsupported(message("rope_type ", method.type, ": expected only the keys ",
                              join(std::move(known)), ", got \"", key, "\""));
  }
}

}  // namespace

std::vector<double> inverse_frequencies(double base, int64_t rotary_dim) {
  std::vector<double> inv_freq(static_cast<size_t>(rotary_dim / 2));
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim);
    inv_freq[i] = 1.0 / std::pow(base, exponent);
  }
  return inv_freq;
}

RopeProfile unscaled_profile(const RopeParameters& p, int64_t length) {
  require<InvalidArgument>(length >= 1, "length: expected an integer >= 1, got ", length);
  RopeProfile profile;
  profile.type = p.type;
  profile.inv_freq = inverse_frequencies(p.theta, p.rotary_dim);
  profile.base = p.theta;
  profile.length = length;
  profile.native_length = p.native_length;
  profile.logn_length = p.logn ? p.native_length : 0;
  return profile;
}

}  // namespace rope

std::unique_ptr<RopeMethod> make_rope_method(const RopeParameters& parameters) {
  std::vector<std::string_view> types;
  for (const rope::MethodEntry& method : rope::all_methods()) {
    types.push_back(method.type);
    if (method.type != parameters.type) continue;
    rope::check_common(parameters);
    rope::check_keys(method, parameters);
    return method.make(parameters);
  }
  throw Unsupported(message("rope_type: expected one of ", rope::join(std::move(types)), ", got \"",
                            parameters.type, "\""));
}

bool rope_type_consumes(std::string_view type, std::string_view key) {
  for (const rope::MethodEntry& method : rope::all_methods()) {
    if (method.type == type) return rope::consumes(method, key);
  }
  return false;
}

std::string describe_rope(const RopeParameters& parameters, const RopeMethod& method) {
  const RopeProfile profile = method.profile(1);
  std::string text = message(profile.type, ", theta ", parameters.theta, ", ", method.describe(),
                             ", native length ", profile.native_length, " tokens");
  if (parameters.rotary_dim < parameters.head_dim) {
    text +=
        message(", ", parameters.rotary_dim, " of ", parameters.head_dim, " dims of a head turn");
  }
  if (profile.logn_length > 0) {
    text += message(", log-n attention past ", profile.logn_length, " tokens");
  }
  return text;
}

}  // namespace longspan
