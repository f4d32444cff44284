#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "rope/rope_method.h"

/// Typed access to the keys of RopeParameters::extra. A key that holds null counts as absent. Each
/// throws InvalidArgument such as `rope_type yarn: factor: expected a number in [1, 1e6], got "2"`.
namespace longspan::rope {

/// Within these bounds every scaled base and frequency is a finite, positive double.
inline constexpr double kMaxTheta = 1e18;
inline constexpr double kMaxFactor = 1e6;

/// A number in [min, max].
double number(const RopeParameters& parameters, std::string_view key, double min, double max);
double number_or(const RopeParameters& parameters, std::string_view key, double fallback,
                 double min, double max);
std::optional<double> optional_number(const RopeParameters& parameters, std::string_view key,
                                      double min, double max);

/// true or false; unlike elsewhere null is refused, which transformers takes for false.
bool boolean_or(const RopeParameters& parameters, std::string_view key, bool fallback);

/// A list of rotary_dim / 2 numbers in [1e-6, 1e6].
std::vector<double> divisors(const RopeParameters& parameters, std::string_view key);

/// The required key "factor" in [1, 1e6].
double scaling_factor(const RopeParameters& parameters);

/// The key "factor" where it may be left to the lengths: "auto" is none, to be chosen per request;
/// null or absent is max_position_embeddings / original_length(), at least 1.
std::optional<double> scaling_factor_or_auto(const RopeParameters& parameters);

/// original_max_position_embeddings, tokens; where absent, max_position_embeddings.
int64_t original_length(const RopeParameters& parameters);

}  // namespace longspan::rope
