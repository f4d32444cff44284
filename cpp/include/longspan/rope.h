#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "longspan/export.h"

namespace longspan {

/// Which length fixes a request's RoPE profile, chosen once at admission.
enum class RopeLengthPolicy {
  kRequest,  ///< min(prompt + max_new_tokens, session_len); scoring: the number of ids
  kPrompt,   ///< the prompt alone, as LMDeploy does; generation runs on under it
  kSession,  ///< session_len; also bounds the request
  kBucket,   ///< the native length times the next power of two, so turns of a chat share a profile
  kFixed,    ///< a stated length; also bounds the request
};

/// A policy and, for kFixed, its length in tokens.
struct RopeLength {
  RopeLengthPolicy policy = RopeLengthPolicy::kRequest;
  int64_t tokens = 0;  ///< kFixed only; > 0
};

/// The rotary embedding of one request: numbers only, immutable once chosen.
/// Pair i of a head is (i, i + head_dim/2), rotated at position p by the angle p * inv_freq[i].
struct LONGSPAN_API RopeProfile {
  std::string type;               ///< "default", "linear", "dynamic"
  std::vector<double> inv_freq;   ///< [rotary_dim / 2], radians per token
  double attention_factor = 1.0;  ///< enters the softmax scale squared, never the cached keys
  double base = 0.0;              ///< theta after scaling
  double factor = 1.0;            ///< the scaling factor in force; 1 where nothing is scaled
  int64_t length = 0;             ///< tokens the profile was chosen for
  int64_t native_length = 0;      ///< max_position_embeddings of the model
  bool operator==(const RopeProfile&) const = default;
};

/// The profile of a model for a length in tokens.
/// config_json is the text of a config.json (rope_scaling or rope_parameters, type or rope_type).
/// rope_scaling_factor: 0 leaves the config's method; >= 1 makes it dynamic NTK with that factor.
/// Throws InvalidArgument, Unsupported (unknown rope type or key, listing the supported ones) or
/// CheckpointError.
LONGSPAN_API RopeProfile rope_profile_from_config(std::string_view config_json, int64_t length,
                                                  double rope_scaling_factor = 0.0);

}  // namespace longspan
