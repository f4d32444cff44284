#include "checkpoint/rope_config.h"

#include <cmath>
#include <utility>

#include "checkpoint/config_fields.h"
#include "checkpoint/model_config.h"
#include "core/check.h"

namespace longspan {
namespace {

constexpr const char* kPart = "partial_rotary_factor";
constexpr const char* kOriginal = "original_max_position_embeddings";

RopeValue rope_value(const JsonObject& dictionary, const std::string& key, const Json& value) {
  if (value.is_null()) return nullptr;
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number()) return value.get<double>();
  if (value.is_string()) return value.get<std::string>();
  std::vector<double> numbers;
  if (!value.is_array()) {
    throw Unsupported(message(dictionary.where(), ": ", key,
                              ": expected a number, a string or a list of numbers, got ",
                              describe(&value), " (RoPE per layer type is not supported)"));
  }
  for (const Json& item : value) {
    if (!item.is_number()) dictionary.fail(key, "a list of numbers");
    numbers.push_back(item.get<double>());
  }
  return numbers;
}

/// Takes in one dictionary; of what an earlier one said only theta stays.
void take(const JsonObject& dictionary, const Json& json, RopeParameters& rope) {
  const std::string type = dictionary.text_or("type", "");
  const std::string rope_type = dictionary.text_or("rope_type", type);
  require<CheckpointError>(type.empty() || type == rope_type, dictionary.where(),
                           ": expected type and rope_type to agree, got \"", type, "\" and \"",
                           rope_type, "\"");
  rope.type = rope_type.empty() ? "default" : rope_type;
  rope.extra.clear();
  rope.theta = dictionary.number_or("rope_theta", rope.theta);
  for (const auto& [key, value] : json.items()) {
    if (key == "type" || key == "rope_type" || key == "rope_theta" || key == kPart) continue;
    rope.extra[key] = rope_value(dictionary, key, value);
  }
}

/// How many dims of a head rotate: the product rounded down, as in transformers.
int64_t rotary_dim_of(const JsonObject& config, const RopeParameters& rope, double part) {
  require<CheckpointError>(part > 0.0 && part <= 1.0, config.where(), ": ", kPart,
                           ": expected a number in (0, 1], got ", part);
  const double dims = static_cast<double>(rope.head_dim) * part;
  if (rope.type == "proportional") return 2 * static_cast<int64_t>(dims / 2);
  const auto whole = static_cast<int64_t>(dims);
  require<CheckpointError>(whole >= 2 && whole % 2 == 0, config.where(), ": ", kPart,
                           ": expected an even number of dims of a head of ", rope.head_dim,
                           ", got ", part, ", which is ", whole);
  return whole;
}

}  // namespace

RopeParameters read_rope(const JsonObject& config, int64_t head_dim, int64_t native_length,
                         double rope_scaling_factor) {
  require<InvalidArgument>(rope_scaling_factor == 0.0 ||
                               (rope_scaling_factor >= 1.0 && std::isfinite(rope_scaling_factor)),
                           "rope_scaling_factor: expected 0 or a number >= 1, got ",
                           rope_scaling_factor);
  RopeParameters rope;
  rope.head_dim = head_dim;
  rope.native_length = native_length;
  rope.theta = config.number_or("rope_theta", rope.theta);
  rope.logn = config.boolean_or("use_logn_attn", false);
  double part = config.number_or(kPart, 1.0);
  // Hugging Face wrote rope_scaling before transformers 5 and rope_parameters since; where a config
  // has both, as after an override, the former counts, as in transformers.
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const Json* json = config.find(key);
    if (json == nullptr) continue;
    const JsonObject dictionary(*json, config.where() + ": " + key);
    if (json->empty()) continue;
    part = dictionary.number_or(kPart, part);
    take(dictionary, *json, rope);
  }
  rope.rotary_dim = rotary_dim_of(config, rope, part);
  // Phi-3's place for it, which wins over the dictionary's, again as in transformers.
  if (config.has(kOriginal) && rope_type_consumes(rope.type, kOriginal)) {
    rope.extra[kOriginal] = static_cast<double>(config.integer(kOriginal, 1, kMaxPositions));
  }
  if (rope_scaling_factor != 0.0) {
    require<Unsupported>(rope.type != "proportional" || rope.rotary_dim == head_dim,
                         "rope_scaling_factor: expected 0 for a model of rope_type proportional, "
                         "got ",
                         rope_scaling_factor);
    rope.type = "dynamic";
    rope.extra = {{"factor", rope_scaling_factor}};
  }
  return rope;
}

RopeParameters parse_rope_parameters(std::string_view config_json, double rope_scaling_factor) {
  const Json json = parse_json(config_json, "config.json");
  const JsonObject config(json, "config.json");
  return read_rope(config, read_head_dim(config), read_native_length(config), rope_scaling_factor);
}

RopeProfile rope_profile_from_config(std::string_view config_json, int64_t length,
                                     double rope_scaling_factor) {
  return make_rope_method(parse_rope_parameters(config_json, rope_scaling_factor))->profile(length);
}

}  // namespace longspan
