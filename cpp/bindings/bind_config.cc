#include <string>
#include <variant>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "longspan/config.h"

namespace longspan::bindings {
namespace {

using RopeLengthValue = std::variant<std::string, int64_t>;
constexpr const char* kRopeLengthExpected =
    "\"request\", \"prompt\", \"session\", \"bucket\" or an int of tokens >= 1";

RopeLengthValue rope_length_to_python(const RopeLength& length) {
  switch (length.policy) {
    case RopeLengthPolicy::kRequest:
      return "request";
    case RopeLengthPolicy::kPrompt:
      return "prompt";
    case RopeLengthPolicy::kSession:
      return "session";
    case RopeLengthPolicy::kBucket:
      return "bucket";
    case RopeLengthPolicy::kFixed:
      return length.tokens;
  }
  throw InvalidArgument("EngineConfig.rope_length: expected a known policy");
}

RopeLength rope_length_from_python(const RopeLengthValue& value) {
  if (const auto* tokens = std::get_if<int64_t>(&value)) {
    if (*tokens >= 1) return {RopeLengthPolicy::kFixed, *tokens};
    throw InvalidArgument(std::string("EngineConfig.rope_length: expected ") + kRopeLengthExpected +
                          ", got " + std::to_string(*tokens));
  }
  const auto& name = std::get<std::string>(value);
  for (auto policy : {RopeLengthPolicy::kRequest, RopeLengthPolicy::kPrompt,
                      RopeLengthPolicy::kSession, RopeLengthPolicy::kBucket}) {
    if (rope_length_to_python({policy}) == RopeLengthValue(name)) return {policy};
  }
  throw InvalidArgument(std::string("EngineConfig.rope_length: expected ") + kRopeLengthExpected +
                        ", got '" + name + "'");
}

}  // namespace

void bind_config(py::module_& m) {
  OptionsClass<EngineConfig>(m, "EngineConfig", "What an engine is built from.")
      .field("dtype", &EngineConfig::dtype, "a str")
      .field("device", &EngineConfig::device, "a str")
      .field("num_threads", &EngineConfig::num_threads, "an int")
      .field("tp", &EngineConfig::tp, "an int")
      .field("session_len", &EngineConfig::session_len, "an int of tokens")
      .field("max_batch_size", &EngineConfig::max_batch_size, "an int")
      .field("cache_max_entry_count", &EngineConfig::cache_max_entry_count, "a number")
      .field("cache_block_seq_len", &EngineConfig::cache_block_seq_len, "an int of tokens")
      .field("max_prefill_token_num", &EngineConfig::max_prefill_token_num, "an int of tokens")
      .field("rope_scaling_factor", &EngineConfig::rope_scaling_factor, "a number")
      .property<RopeLengthValue>(
          "rope_length", kRopeLengthExpected,
          [](const EngineConfig& self) { return rope_length_to_python(self.rope_length); },
          [](EngineConfig& self, const RopeLengthValue& value) {
            self.rope_length = rope_length_from_python(value);
          })
      .field("deterministic", &EngineConfig::deterministic, "a bool")
      .field("hf_overrides", &EngineConfig::hf_overrides, "a str holding a JSON object");

  OptionsClass<GenerationConfig>(m, "GenerationConfig", "How one request generates.")
      .field("max_new_tokens", &GenerationConfig::max_new_tokens, "an int of tokens or None")
      .field("do_sample", &GenerationConfig::do_sample, "a bool")
      .field("temperature", &GenerationConfig::temperature, "a number")
      .field("top_k", &GenerationConfig::top_k, "an int")
      .field("top_p", &GenerationConfig::top_p, "a number")
      .field("seed", &GenerationConfig::seed, "an int in [0, 2**64) or None")
      .field("stop_token_ids", &GenerationConfig::stop_token_ids, "a list of token ids")
      .field("ignore_eos", &GenerationConfig::ignore_eos, "a bool");
}

}  // namespace longspan::bindings
