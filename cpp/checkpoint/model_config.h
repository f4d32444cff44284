#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "rope/rope_method.h"

namespace longspan {

/// A decoder-only model's config.json, checked. Names are Hugging Face's.
struct ModelConfig {
  std::string architecture;  ///< config's architectures[0]
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  ///< divides num_heads
  int64_t head_dim = 0;      ///< even
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;        ///< heads of q and k are normed before they are rotated
  int64_t sliding_window = 0;  ///< keys a query sees, itself among them; 0: all
  int64_t max_position_embeddings = 0;
  RopeParameters rope;
  std::vector<int32_t> eos_token_ids;  ///< generation_config.json's, else config.json's
};

/// Whether some linears have biases: what the first of these keys that config.json has says.
struct BiasRule {
  std::vector<std::string_view> keys = {};
  bool fallback = false;  ///< where it has none of them
};

/// What a family's config.json means where families differ, and what it leaves unsaid.
struct ConfigDialect {
  BiasRule qkv_bias = {};
  BiasRule o_bias = {};
  BiasRule mlp_bias = {};
  bool qk_norm = false;
  int64_t sliding_window = 0;      ///< where there is no such key; null, though, is none
  bool use_sliding_window = true;  ///< where there is no such key
};

/// From the name of an architecture. Throws Unsupported for one that is not known.
using FindDialect = std::function<ConfigDialect(std::string_view)>;

/// Reads model_dir/config.json and generation_config.json (if there).
/// hf_overrides: a JSON object merged in (RFC 7396) or empty. rope_scaling_factor: see
/// EngineConfig. Throws CheckpointError naming file and field, InvalidArgument for a bad override
/// or factor, and Unsupported for an activation or feature.
ModelConfig read_model_config(const std::string& model_dir, std::string_view hf_overrides,
                              double rope_scaling_factor, const FindDialect& find_dialect);

/// The rope part alone, from the text of a config.json.
RopeParameters parse_rope_parameters(std::string_view config_json, double rope_scaling_factor);

}  // namespace longspan
