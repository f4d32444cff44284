#include "checkpoint/model_config.h"

#include <filesystem>
#include <limits>

#include "checkpoint/config_fields.h"
#include "checkpoint/json.h"
#include "checkpoint/model_dir.h"
#include "checkpoint/rope_config.h"
#include "core/check.h"

namespace longspan {
namespace {

constexpr int64_t kMaxConfigBytes = int64_t{1} << 20;

Json read_json(const std::string& model_dir, const char* name) {
  const std::filesystem::path path = std::filesystem::path(model_dir) / name;
  return parse_json(read_text_file(path.string(), kMaxConfigBytes), name);
}

/// RFC 7396.
void apply_overrides(Json& config, std::string_view overrides) {
  try {
    config.merge_patch(parse_json(overrides, "hf_overrides"));
  } catch (const CheckpointError& error) {  // this text is the caller's, not a file's
    throw InvalidArgument(error.what());
  }
}

std::string read_architecture(const JsonObject& config) {
  const std::vector<std::string> names = config.texts("architectures");
  if (names.size() != 1) config.fail("architectures", "a list of one name");
  return names.front();
}

/// Refuses what would change the model's results and is not built.
void require_supported(const JsonObject& config) {
  const auto refuse = [&](const char* key) {
    throw Unsupported(
        message(config.where(), ": ", key, ": not supported, got ", describe(config.find(key))));
  };
  for (const char* key : {"quantization_config", "compression_config", "attention_chunk_size"}) {
    if (config.has(key)) refuse(key);
  }
  for (const std::string& type : config.texts("layer_types")) {
    require<Unsupported>(type == "full_attention", config.where(),
                         ": layer_types: expected only full_attention, got \"", type, "\"");
  }
  const std::string activation = config.text_or("hidden_act", "silu");
  require<Unsupported>(activation == "silu", config.where(), ": hidden_act: expected silu, got \"",
                       activation, "\"");
}

/// All of the keys that are there must agree.
bool read_bias(const JsonObject& config, const BiasRule& rule) {
  std::string_view first;  // of the keys that are there
  bool bias = rule.fallback;
  for (const std::string_view key : rule.keys) {
    const bool value = config.boolean_or(key, bias);
    if (!first.empty() && value != bias) {
      config.fail(key, message("the value of ", first, " (", bias ? "true" : "false", ")"));
    }
    if (config.has(key)) first = key;
    bias = value;
  }
  return bias;
}

int64_t read_sliding_window(const JsonObject& config, const ConfigDialect& dialect) {
  // Several families write a window and switch it off.
  if (!config.boolean_or("use_sliding_window", dialect.use_sliding_window)) return 0;
  const bool unsaid = !config.has_key("sliding_window");
  return config.integer_or("sliding_window", unsaid ? dialect.sliding_window : 0, 1, kMaxPositions);
}

std::vector<int32_t> read_eos(const std::string& model_dir, const JsonObject& config) {
  const auto ids_of = [](const JsonObject& object) -> std::vector<int32_t> {
    constexpr int64_t kMaxId = std::numeric_limits<int32_t>::max();
    const Json* value = object.find("eos_token_id");
    if (value == nullptr) return {};
    if (!value->is_array()) {
      return {static_cast<int32_t>(object.integer("eos_token_id", 0, kMaxId))};
    }
    const std::vector<int64_t> ids = object.integers("eos_token_id", 0, kMaxId);
    return {ids.begin(), ids.end()};
  };
  const char* name = "generation_config.json";
  if (has_file(model_dir, name)) {
    const Json json = read_json(model_dir, name);
    std::vector<int32_t> ids = ids_of(JsonObject(json, name));
    if (!ids.empty()) return ids;
  }
  return ids_of(config);
}

}  // namespace

ModelConfig read_model_config(const std::string& model_dir, std::string_view hf_overrides,
                              double rope_scaling_factor, const FindDialect& find_dialect) {
  require_model_dir(model_dir);
  Json json = read_json(model_dir, "config.json");
  std::string where = "config.json";
  if (!hf_overrides.empty()) {
    apply_overrides(json, hf_overrides);
    where += " with hf_overrides";
  }
  const JsonObject config(json, where);

  ModelConfig m;
  m.architecture = read_architecture(config);
  const ConfigDialect dialect = find_dialect(m.architecture);
  require_supported(config);
  m.vocab_size = config.integer("vocab_size", 1, kMaxVocab);
  m.hidden_size = config.integer("hidden_size", 1, kMaxHidden);
  m.intermediate_size = config.integer("intermediate_size", 1, kMaxIntermediate);
  m.num_layers = config.integer("num_hidden_layers", 1, kMaxLayers);
  m.num_heads = read_num_heads(config);
  m.num_kv_heads = config.integer_or("num_key_value_heads", m.num_heads, 1, m.num_heads);
  if (m.num_heads % m.num_kv_heads != 0) {
    config.fail("num_key_value_heads",
                message("a divisor of num_attention_heads (", m.num_heads, ")"));
  }
  m.head_dim = read_head_dim(config);
  m.rms_norm_eps = config.number_or("rms_norm_eps", m.rms_norm_eps);
  if (!(m.rms_norm_eps >= 0.0 && m.rms_norm_eps <= 1.0)) {
    config.fail("rms_norm_eps", "a number in [0, 1]");
  }
  m.tie_word_embeddings = config.boolean_or("tie_word_embeddings", false);
  m.qkv_bias = read_bias(config, dialect.qkv_bias);
  m.o_bias = read_bias(config, dialect.o_bias);
  m.mlp_bias = read_bias(config, dialect.mlp_bias);
  m.qk_norm = dialect.qk_norm;
  m.sliding_window = read_sliding_window(config, dialect);
  m.max_position_embeddings = read_native_length(config);
  m.rope = read_rope(config, m.head_dim, m.max_position_embeddings, rope_scaling_factor);
  m.eos_token_ids = read_eos(model_dir, config);
  return m;
}

}  // namespace longspan
