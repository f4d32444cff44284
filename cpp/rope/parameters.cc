#include "rope/parameters.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/check.h"

namespace longspan::rope {
namespace {

constexpr double kMaxLength = 1L << 28;  // tokens; as of max_position_embeddings

const RopeValue* find(const RopeParameters& p, std::string_view key) {
  const auto found = p.extra.find(std::string(key));
  return found == p.extra.end() ? nullptr : &found->second;
}

bool absent(const RopeValue* value) {
  return value == nullptr || std::holds_alternative<std::nullptr_t>(*value);
}

std::string describe(const RopeValue* value) {
  if (absent(value)) return "nothing";
  if (const auto* number = std::get_if<double>(value)) return message(*number);
  if (const auto* boolean = std::get_if<bool>(value)) return *boolean ? "true" : "false";
  if (const auto* text = std::get_if<std::string>(value)) return message('"', *text, '"');
  return message("a list of ", std::get<std::vector<double>>(*value).size());
}

[[noreturn]] void fail(const RopeParameters& p, std::string_view key, const std::string& expected,
                       const std::string& got) {
  throw InvalidArgument(
      message("rope_type ", p.type, ": ", key, ": expected ", expected, ", got ", got));
}

/// A bound as people write it: 1e6, not 1e+06.
std::string bound(double value) {
  std::string text = message(value);
  const size_t at = text.find('e');
  if (at == std::string::npos) return text;
  return message(text.substr(0, at), 'e', std::stoi(text.substr(at + 1)));
}

std::string range(double min, double max) {
  return message("[", bound(min), ", ", bound(max), "]");
}

}  // namespace

double number(const RopeParameters& p, std::string_view key, double min, double max) {
  const RopeValue* value = find(p, key);
  const double* number = value == nullptr ? nullptr : std::get_if<double>(value);
  if (number == nullptr || !(*number >= min && *number <= max)) {
    fail(p, key, "a number in " + range(min, max), describe(value));
  }
  return *number;
}

std::optional<double> optional_number(const RopeParameters& p, std::string_view key, double min,
                                      double max) {
  if (absent(find(p, key))) return std::nullopt;
  return number(p, key, min, max);
}

double number_or(const RopeParameters& p, std::string_view key, double fallback, double min,
                 double max) {
  return optional_number(p, key, min, max).value_or(fallback);
}

bool boolean_or(const RopeParameters& p, std::string_view key, bool fallback) {
  const RopeValue* value = find(p, key);
  if (value == nullptr) return fallback;
  const bool* boolean = std::get_if<bool>(value);
  if (boolean == nullptr) fail(p, key, "true or false", describe(value));
  return *boolean;
}

std::vector<double> divisors(const RopeParameters& p, std::string_view key) {
  const auto count = static_cast<size_t>(p.rotary_dim / 2);
  const std::string expected =
      message("a list of ", count, " numbers in ", range(1 / kMaxFactor, kMaxFactor));
  const RopeValue* value = find(p, key);
  const auto* list = value == nullptr ? nullptr : std::get_if<std::vector<double>>(value);
  if (list == nullptr || list->size() != count) fail(p, key, expected, describe(value));
  for (const double item : *list) {
    if (!(item >= 1 / kMaxFactor && item <= kMaxFactor)) {
      fail(p, key, expected, message("one with ", item));
    }
  }
  return *list;
}

double scaling_factor(const RopeParameters& p) { return number(p, "factor", 1.0, kMaxFactor); }

std::optional<double> scaling_factor_or_auto(const RopeParameters& p) {
  const RopeValue* value = find(p, "factor");
  if (absent(value)) {
    const int64_t original = original_length(p);
    if (original > p.native_length) {
      fail(p, "original_max_position_embeddings",
           message("at most max_position_embeddings (", p.native_length, ") without a factor"),
           message(original));
    }
    return static_cast<double>(p.native_length) / static_cast<double>(original);
  }
  const auto* text = std::get_if<std::string>(value);
  if (text != nullptr && *text == "auto") return std::nullopt;
  if (!std::holds_alternative<double>(*value)) {
    fail(p, "factor", "\"auto\" or a number in " + range(1.0, kMaxFactor), describe(value));
  }
  return scaling_factor(p);
}

int64_t original_length(const RopeParameters& p) {
  constexpr std::string_view kKey = "original_max_position_embeddings";
  const RopeValue* value = find(p, kKey);
  if (absent(value)) return p.native_length;
  const double* length = std::get_if<double>(value);
  if (length == nullptr || !(*length >= 1.0 && *length <= kMaxLength) ||
      *length != std::floor(*length)) {
    fail(p, kKey, message("an integer in [1, ", static_cast<int64_t>(kMaxLength), "]"),
         describe(value));
  }
  return static_cast<int64_t>(*length);
}

}  // namespace longspan::rope
