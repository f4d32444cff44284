#include "checkpoint/rope_config.h"

#include <cmath>
#include <utility>

#include "checkpoint/config_fields.h"
#include "checkpoint/model_config.h"
#include "core/check.h"

namespace longspan {
namespace {

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

/// Takes in one dictionary; what an earlier one said is replaced.
void merge(const JsonObject& dictionary, const Json& json, RopeParameters& rope) {
  const std::string type = dictionary.text_or("type", "");
  const std::string rope_type = dictionary.text_or("rope_type", type);
  require<CheckpointError>(type.empty() || type == rope_type, dictionary.where(),
                           ": expected type and rope_type to agree, got \"", type, "\" and \"",
                           rope_type, "\"");
  if (!rope_type.empty()) rope.type = rope_type;
  rope.theta = dictionary.number_or("rope_theta", rope.theta);
  for (const auto& [key, value] : json.items()) {
    if (key == "type" || key == "rope_type" || key == "rope_theta") continue;
    rope.extra[key] = rope_value(dictionary, key, value);
  }
}

void require_full_rotation(const JsonObject& object) {
  const double part = object.number_or("partial_rotary_factor", 1.0);
  require<Unsupported>(part == 1.0, object.where(), ": partial_rotary_factor: expected 1, got ",
                       part);
}

}  // namespace

RopeParameters read_rope(const JsonObject& config, int64_t head_dim, int64_t native_length,
                         double rope_scaling_factor) {
  require<InvalidArgument>(rope_scaling_factor == 0.0 ||
                               (rope_scaling_factor >= 1.0 && std::isfinite(rope_scaling_factor)),
                           "rope_scaling_factor: expected 0 or a number >= 1, got ",
                           rope_scaling_factor);
  RopeParameters rope;
  rope.rotary_dim = head_dim;
  rope.native_length = native_length;
  rope.theta = config.number_or("rope_theta", rope.theta);
  require_full_rotation(config);
  // Hugging Face wrote rope_scaling before transformers 5 and rope_parameters since; where a config
  // has both, as after an override, the former's keys win.
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const Json* json = config.find(key);
    if (json == nullptr) continue;
    const JsonObject dictionary(*json, config.where() + ": " + key);
    require_full_rotation(dictionary);
    merge(dictionary, *json, rope);
  }
  rope.extra.erase("partial_rotary_factor");
  if (rope_scaling_factor != 0.0) {
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
