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
  bool attention_bias = false;
  bool mlp_bias = false;
  int64_t max_position_embeddings = 0;
  RopeParameters rope;
  std::vector<int32_t> eos_token_ids;  ///< generation_config.json's, else config.json's
};

/// Reads model_dir/config.json and generation_config.json (if there).
/// hf_overrides: a JSON object merged in (RFC 7396) or empty. rope_scaling_factor: see
/// EngineConfig. Throws CheckpointError naming file and field, InvalidArgument for a bad override
/// or factor, and Unsupported for an activation or feature.
/// check_architecture: called with the architecture before anything else is read, to refuse it.
ModelConfig read_model_config(const std::string& model_dir, std::string_view hf_overrides,
                              double rope_scaling_factor,
                              const std::function<void(std::string_view)>& check_architecture = {});

/// The rope part alone, from the text of a config.json.
RopeParameters parse_rope_parameters(std::string_view config_json, double rope_scaling_factor);

}  // namespace longspan
