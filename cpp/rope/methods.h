#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "rope/rope_method.h"

namespace longspan::rope {

/// One row of the table of methods. A new method is one file that defines such a row, declared
/// below and listed in rope_method.cc.
struct MethodEntry {
  std::string_view type;               ///< config.json's rope_type
  std::vector<std::string_view> keys;  ///< the keys of RopeParameters::extra that it consumes
  std::unique_ptr<RopeMethod> (*make)(const RopeParameters& parameters);
};

MethodEntry default_method();
MethodEntry linear_method();
MethodEntry dynamic_ntk_method();
MethodEntry yarn_method();
MethodEntry llama3_method();
MethodEntry longrope_method();
MethodEntry proportional_method();

/// base^(-2i/D) for i in [0, D/2), radians per token (Su et al. 2021, RoFormer, section 3.2.2).
std::vector<double> inverse_frequencies(double base, int64_t rotary_dim);

/// The profile of rotary embeddings as trained: no scaling in force.
RopeProfile unscaled_profile(const RopeParameters& parameters, int64_t length);

}  // namespace longspan::rope
