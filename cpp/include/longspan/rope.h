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
/// With P = inv_freq.size() pairs, pair i of a head is (i, i + P), rotated at position p by the
/// angle p * inv_freq[i]; dims from 2 P on pass through (partial rotation).
struct LONGSPAN_API RopeProfile {
  /// "default", "linear", "dynamic", "llama3", "longrope", "proportional" or "yarn": config.json's.
  std::string type;
  std::vector<double> inv_freq;  ///< [pairs], radians per token; pairs <= head_dim / 2
  /// Scales the rotated dims of query and key, so enters the softmax squared; never cached keys.
  double attention_factor = 1.0;
  double base = 0.0;    ///< theta after scaling; only "dynamic" changes it
  double factor = 1.0;  ///< the scaling factor in force; 1 where nothing is scaled
  int64_t length = 0;   ///< tokens the profile was chosen for
  /// Tokens the model takes as trained: max_position_embeddings, or, where the method scales from
  /// original_max_position_embeddings on ("longrope", "yarn" with factor "auto"), that.
  int64_t native_length = 0;
  /// 0, or log-n attention (config.json's use_logn_attn): the query of the n-th token, counted from
  /// 1, is multiplied by max(1, ln n / ln logn_length).
  int64_t logn_length = 0;
  bool operator==(const RopeProfile&) const = default;
};

/// The profile of a model for a length in tokens.
/// config_json is the text of a config.json (rope_scaling or rope_parameters, type or rope_type).
/// A factor of "auto" (yarn, longrope) is max(1, length / original_max_position_embeddings).
/// rope_scaling_factor: 0 leaves the config's method; >= 1 makes it dynamic NTK with that factor.
/// Throws InvalidArgument, Unsupported (unknown rope type or key, listing the supported ones) or
/// CheckpointError.
LONGSPAN_API RopeProfile rope_profile_from_config(std::string_view config_json, int64_t length,
                                                  double rope_scaling_factor = 0.0);

}  // namespace longspan
