#include "rope/rope_method.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "rope/methods.h"

namespace longspan {
namespace rope {
namespace {

// Within these bounds every scaled base and frequency is a finite, positive double.
constexpr double kMaxTheta = 1e18;
constexpr double kMaxFactor = 1e6;

std::string join(std::vector<std::string_view> names) {
  std::sort(names.begin(), names.end());
  std::string all;
  for (const std::string_view name : names) {
    if (!all.empty()) all += ", ";
    all += name;
  }
  return all;
}

std::string describe(const RopeValue* value) {
  if (value == nullptr || std::holds_alternative<std::nullptr_t>(*value)) return "nothing";
  if (const auto* number = std::get_if<double>(value)) return message(*number);
  if (const auto* boolean = std::get_if<bool>(value)) return *boolean ? "true" : "false";
  if (const auto* text = std::get_if<std::string>(value)) return message('"', *text, '"');
  return "a list";
}

void check_common(const RopeParameters& p) {
  require<InvalidArgument>(p.theta >= 1.0 && p.theta <= kMaxTheta,
                           "rope_theta: expected a number in [1, 1e18], got ", p.theta);
  require<InvalidArgument>(p.rotary_dim >= 2 && p.rotary_dim % 2 == 0,
                           "rotary dimension: expected an even integer >= 2, got ", p.rotary_dim);
  require<InvalidArgument>(p.native_length >= 1,
                           "max_position_embeddings: expected an integer >= 1, got ",
                           p.native_length);
}

void check_keys(const MethodEntry& method, const RopeParameters& p) {
  for (const auto& [key, value] : p.extra) {
    if (std::find(method.keys.begin(), method.keys.end(), key) != method.keys.end()) continue;
    std::vector<std::string_view> known = method.keys;
    known.insert(known.end(), {"rope_theta", "rope_type"});
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
  return profile;
}

double scaling_factor(const RopeParameters& p) {
  const auto found = p.extra.find("factor");
  const RopeValue* value = found == p.extra.end() ? nullptr : &found->second;
  const double* factor = value == nullptr ? nullptr : std::get_if<double>(value);
  require<InvalidArgument>(factor != nullptr && *factor >= 1.0 && *factor <= kMaxFactor,
                           "rope_type ", p.type, ": factor: expected a number in [1, 1e6], got ",
                           describe(value));
  return *factor;
}

}  // namespace rope

std::unique_ptr<RopeMethod> make_rope_method(const RopeParameters& parameters) {
  const std::array methods = {rope::default_method(), rope::linear_method(),
                              rope::dynamic_ntk_method()};
  std::vector<std::string_view> types;
  for (const rope::MethodEntry& method : methods) {
    types.push_back(method.type);
    if (method.type != parameters.type) continue;
    rope::check_common(parameters);
    rope::check_keys(method, parameters);
    return method.make(parameters);
  }
  throw Unsupported(message("rope_type: expected one of ", rope::join(std::move(types)), ", got \"",
                            parameters.type, "\""));
}

}  // namespace longspan
