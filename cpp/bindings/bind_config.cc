#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "bindings/rope_length.h"
#include "longspan/config.h"

namespace longspan::bindings {

void bind_config(py::module_& m) {
  OptionsClass<EngineConfig>(m, "EngineConfig", "What an engine is built from.")
      .field("dtype", &EngineConfig::dtype, "a str")
      .field("device", &EngineConfig::device, "a str")
      .field("num_threads", &EngineConfig::num_threads, "an int")
      .field("tp", &EngineConfig::tp, "an int")
      .field("cp", &EngineConfig::cp, "an int")
      .field("session_len", &EngineConfig::session_len, "an int of tokens")
      .field("max_batch_size", &EngineConfig::max_batch_size, "an int")
      .field("cache_max_entry_count", &EngineConfig::cache_max_entry_count, "a number")
      .field("cache_block_seq_len", &EngineConfig::cache_block_seq_len, "an int of tokens")
      .field("kv_cache_dtype", &EngineConfig::kv_cache_dtype, "a str")
      .field("prefill_attention", &EngineConfig::prefill_attention, "a str")
      .field("linear_dtype", &EngineConfig::linear_dtype, "a str")
      .field("enable_prefix_caching", &EngineConfig::enable_prefix_caching, "a bool")
      .field("max_prefill_token_num", &EngineConfig::max_prefill_token_num, "an int of tokens")
      .field("rope_scaling_factor", &EngineConfig::rope_scaling_factor, "a number")
      .property<RopeLengthValue>(
          "rope_length", kRopeLengthExpected,
          [](const EngineConfig& self) { return rope_length_to_python(self.rope_length); },
          [](EngineConfig& self, const RopeLengthValue& value) {
            self.rope_length = rope_length_from_python(value, "EngineConfig.rope_length");
          })
      .field("deterministic", &EngineConfig::deterministic, "a bool")
      .field("hf_overrides", &EngineConfig::hf_overrides, "a str holding a JSON object");

  OptionsClass<GenerationConfig>(m, "GenerationConfig", "How one request generates.")
      .field("max_new_tokens", &GenerationConfig::max_new_tokens, "an int of tokens or None")
      .field("do_sample", &GenerationConfig::do_sample, "a bool")
      .field("temperature", &GenerationConfig::temperature, "a number")
      .field("top_k", &GenerationConfig::top_k, "an int")
      .field("top_p", &GenerationConfig::top_p, "a number")
      .field("min_p", &GenerationConfig::min_p, "a number")
      .field("repetition_penalty", &GenerationConfig::repetition_penalty, "a number")
      .field("frequency_penalty", &GenerationConfig::frequency_penalty, "a number")
      .field("presence_penalty", &GenerationConfig::presence_penalty, "a number")
      .field("min_new_tokens", &GenerationConfig::min_new_tokens, "an int of tokens")
      .field("bad_sequences", &GenerationConfig::bad_sequences, "a list of lists of token ids")
      .field("logprobs", &GenerationConfig::logprobs, "an int or None")
      .field("seed", &GenerationConfig::seed, "an int in [0, 2**64) or None")
      .field("stop_token_ids", &GenerationConfig::stop_token_ids, "a list of token ids")
      .field("ignore_eos", &GenerationConfig::ignore_eos, "a bool");
}

}  // namespace longspan::bindings
