#include <nlohmann/json.hpp>

#include "checkpoint/files.h"
#include "checkpoint/model_config.h"
#include "core/check.h"
#include "longspan/error.h"
#include "model/architecture.h"

namespace longspan {
namespace {

using nlohmann::json;
using test::expect_throw;
using test::TempDir;

json llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"vocab_size", 49152},
          {"hidden_size", 576},
          {"intermediate_size", 1536},
          {"num_hidden_layers", 30},
          {"num_attention_heads", 9},
          {"num_key_value_heads", 3},
          {"max_position_embeddings", 8192},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 100000.0},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", true},
          {"eos_token_id", 2},
          {"a_key_of_tomorrow", {1, 2}}};
}

ModelConfig read(const TempDir& dir, const std::string& overrides = "", double factor = 0.0) {
  return read_model_config(dir.path(), overrides, factor, config_dialect);
}

TEST(Config, ReadsALlama) {
  const TempDir dir;
  dir.write("config.json", llama().dump());
  const ModelConfig m = read(dir);
  EXPECT_EQ(m.architecture, "LlamaForCausalLM");
  EXPECT_EQ(m.vocab_size, 49152);
  EXPECT_EQ(m.hidden_size, 576);
  EXPECT_EQ(m.intermediate_size, 1536);
  EXPECT_EQ(m.num_layers, 30);
  EXPECT_EQ(m.num_heads, 9);
  EXPECT_EQ(m.num_kv_heads, 3);
  EXPECT_EQ(m.head_dim, 64);
  EXPECT_EQ(m.rms_norm_eps, 1e-5);
  EXPECT_TRUE(m.tie_word_embeddings);
  EXPECT_FALSE(m.qkv_bias);
  EXPECT_FALSE(m.o_bias);
  EXPECT_FALSE(m.mlp_bias);
  EXPECT_FALSE(m.qk_norm);
  EXPECT_EQ(m.sliding_window, 0);
  EXPECT_EQ(m.max_position_embeddings, 8192);
  EXPECT_EQ(m.rope.theta, 100000.0);
  EXPECT_EQ(m.rope.type, "default");
  EXPECT_EQ(m.rope.rotary_dim, 64);
  EXPECT_EQ(m.rope.native_length, 8192);
  EXPECT_EQ(m.eos_token_ids, std::vector<int32_t>{2});
}

TEST(Config, Defaults) {
  const TempDir dir;
  json config = llama();
  for (const char* key : {"num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act",
                          "tie_word_embeddings", "eos_token_id"}) {
    config.erase(key);
  }
  config["head_dim"] = 32;
  config["mlp_bias"] = nullptr;
  dir.write("config.json", config.dump());
  const ModelConfig m = read(dir);
  EXPECT_EQ(m.num_kv_heads, 9);
  EXPECT_EQ(m.head_dim, 32);
  EXPECT_EQ(m.rms_norm_eps, 1e-6);
  EXPECT_EQ(m.rope.theta, 10000.0);
  EXPECT_FALSE(m.tie_word_embeddings);
  EXPECT_TRUE(m.eos_token_ids.empty());
}

TEST(Config, GenerationConfigNamesTheEndTokens) {
  const TempDir dir;
  dir.write("config.json", llama().dump());
  dir.write("generation_config.json", R"({"eos_token_id":[5,7]})");
  EXPECT_EQ(read(dir).eos_token_ids, (std::vector<int32_t>{5, 7}));
  dir.write("generation_config.json", R"({"eos_token_id":9})");
  EXPECT_EQ(read(dir).eos_token_ids, std::vector<int32_t>{9});
  dir.write("generation_config.json", R"({"eos_token_id":null})");
  EXPECT_EQ(read(dir).eos_token_ids, std::vector<int32_t>{2});
  for (const char* bad : {"-1", "2147483648", "\"2\"", "[2,\"3\"]", "[true]", "2.0"}) {
    dir.write("generation_config.json", std::string(R"({"eos_token_id":)") + bad + "}");
    expect_throw<CheckpointError>([&] { read(dir); }, "generation_config.json: eos_token_id: ");
  }
  dir.write("generation_config.json", "{");
  expect_throw<CheckpointError>([&] { read(dir); }, "generation_config.json: expected valid JSON");
}

TEST(Config, OverridesAreMerged) {
  const TempDir dir;
  dir.write("config.json", llama().dump());
  const ModelConfig m = read(dir, R"({"max_position_embeddings":4096,"eos_token_id":null,
               "rope_scaling":{"type":"linear","factor":2}})");
  EXPECT_EQ(m.max_position_embeddings, 4096);
  EXPECT_TRUE(m.eos_token_ids.empty());
  EXPECT_EQ(m.rope.type, "linear");
  for (const char* bad : {"{", "[]", "3", "{\"a\":1,\"a\":2}", "rope"}) {
    expect_throw<InvalidArgument>([&] { read(dir, bad); }, "hf_overrides: expected");
  }
  expect_throw<CheckpointError>(
      [&] { read(dir, R"({"hidden_size":"x"})"); },
      "config.json with hf_overrides: hidden_size: expected an integer in "
      "[1, 262144], got \"x\"");
}

struct Bad {
  const char* key;
  json value;
  std::string message;
};

TEST(Config, RefusesHostileValuesNamingTheField) {
  const TempDir dir;
  const auto huge = std::numeric_limits<uint64_t>::max();
  const std::vector<Bad> table = {
      {"vocab_size", nullptr, "vocab_size: expected an integer in [1, 16777216], got nothing"},
      {"vocab_size", 0, "vocab_size: expected"},
      {"vocab_size", huge, "vocab_size: expected"},
      {"hidden_size", "foo", "hidden_size: expected an integer in [1, 262144], got \"foo\""},
      {"hidden_size", 576.0, "hidden_size: expected an integer in [1, 262144], got 576.0"},
      {"hidden_size", 577, "hidden_size: expected a multiple of num_attention_heads (9)"},
      {"hidden_size", 9 * 63, "head_dim: expected an even number, got 63"},
      {"intermediate_size", -1, "intermediate_size: expected"},
      {"intermediate_size", true, "intermediate_size: expected"},
      {"num_hidden_layers", 1 << 20, "num_hidden_layers: expected an integer in [1, 1024]"},
      {"num_attention_heads", 0, "num_attention_heads: expected"},
      {"num_key_value_heads", 10, "num_key_value_heads: expected an integer in [1, 9], got 10"},
      {"num_key_value_heads", 2, "num_key_value_heads: expected a divisor of"},
      {"head_dim", 0, "head_dim: expected"},
      {"head_dim", 63, "head_dim: expected an even number, got 63"},
      {"head_dim", 1 << 18, "num_attention_heads * head_dim: expected at most 262144"},
      {"max_position_embeddings", 0, "max_position_embeddings: expected"},
      {"max_position_embeddings", int64_t{1} << 40, "max_position_embeddings: expected"},
      {"rms_norm_eps", -1e-5, "rms_norm_eps: expected a number in [0, 1], got -1e-05"},
      {"rms_norm_eps", "1e-5", "rms_norm_eps: expected a number, got \"1e-5\""},
      {"tie_word_embeddings", 1, "tie_word_embeddings: expected true or false, got 1"},
      {"attention_bias", "no", "attention_bias: expected true or false"},
      {"architectures", nullptr, "architectures: expected a list of one name, got nothing"},
      {"architectures", json::array(), "architectures: expected a list of one name"},
      {"architectures", "LlamaForCausalLM", "architectures: expected a list of strings"},
      {"architectures", {1}, "architectures: expected a list of strings, got one with 1"},
      {"architectures", {"A", "B"}, "architectures: expected a list of one name, got a list of 2"},
      {"eos_token_id", {{"a", 1}}, "eos_token_id: expected an integer"},
      {"hidden_act", 3, "hidden_act: expected a string, got 3"},
      {"rope_theta", "1e4", "rope_theta: expected a number, got \"1e4\""},
      {"rope_scaling", "dynamic", "rope_scaling: expected an object, got \"dynamic\""},
      {"sliding_window", 0, "sliding_window: expected an integer in [1, 268435456], got 0"},
      {"use_sliding_window", "no", "use_sliding_window: expected true or false, got \"no\""},
  };
  for (const Bad& bad : table) {
    SCOPED_TRACE(std::string(bad.key) + " = " + bad.value.dump());
    json config = llama();
    config[bad.key] = bad.value;
    dir.write("config.json", config.dump());
    expect_throw<CheckpointError>([&] { read(dir); }, "config.json: " + bad.message);
  }
}

TEST(Config, RefusesWhatIsNotBuiltNamingTheField) {
  const TempDir dir;
  const std::vector<Bad> table = {
      {"hidden_act", "gelu", "hidden_act: expected silu, got \"gelu\""},
      {"quantization_config", {{"bits", 4}}, "quantization_config: not supported, got an object"},
      {"attention_chunk_size", 8192, "attention_chunk_size: not supported"},
      {"layer_types", {"full_attention", "sliding_attention"}, "layer_types: expected only"},
  };
  for (const Bad& bad : table) {
    SCOPED_TRACE(bad.key);
    json config = llama();
    config[bad.key] = bad.value;
    dir.write("config.json", config.dump());
    expect_throw<Unsupported>([&] { read(dir); }, "config.json: " + bad.message);
  }
  json config = llama();
  config.update({{"sliding_window", 4096},
                 {"use_sliding_window", false},
                 {"quantization_config", nullptr},
                 {"layer_types", {"full_attention"}}});
  dir.write("config.json", config.dump());
  EXPECT_EQ(read(dir).num_layers, 30);
}

struct Family {
  const char* architecture;
  json config;
  std::string biases;  ///< of "q", "o" and "m": those of q, k and v, of o and of the MLP
  bool qk_norm = false;
};

TEST(Config, FamiliesSayWhichBiasesAndNormsThereAre) {
  const TempDir dir;
  const std::vector<Family> table = {
      {"LlamaForCausalLM", {{"attention_bias", true}}, "qo"},
      {"LlamaForCausalLM", {{"mlp_bias", true}}, "m"},
      {"MistralForCausalLM", {{"sliding_window", nullptr}}, ""},
      {"Qwen2ForCausalLM", json::object(), "q"},
      {"Qwen3ForCausalLM", json::object(), "", true},
      {"Qwen3ForCausalLM", {{"attention_bias", true}}, "qo", true},
      {"InternLM2ForCausalLM", {{"bias", false}}, ""},
      {"InternLM2ForCausalLM", json::object(), "qo"},  // as its own code has it
      {"InternLM3ForCausalLM", json::object(), ""},
      {"InternLM3ForCausalLM", {{"qkv_bias", true}, {"bias", false}}, "q"},
      {"InternLM3ForCausalLM", {{"qkv_bias", false}, {"bias", true}}, "om"},
      {"InternLM3ForCausalLM", {{"attention_bias", true}, {"mlp_bias", true}}, "qom"},
      {"InternLM3ForCausalLM", {{"qkv_bias", true}, {"attention_bias", true}}, "q"},
  };
  for (const Family& family : table) {
    SCOPED_TRACE(message(family.architecture, " ", family.config.dump()));
    json config = llama();
    config["architectures"] = {family.architecture};
    config.update(family.config);
    dir.write("config.json", config.dump());
    const ModelConfig m = read(dir);
    EXPECT_EQ(message(m.qkv_bias ? "q" : "", m.o_bias ? "o" : "", m.mlp_bias ? "m" : ""),
              family.biases);
    EXPECT_EQ(m.qk_norm, family.qk_norm);
    EXPECT_EQ(m.sliding_window, 0);
  }
  json config = llama();
  config.update(
      {{"architectures", {"InternLM3ForCausalLM"}}, {"qkv_bias", false}, {"attention_bias", true}});
  dir.write("config.json", config.dump());
  expect_throw<CheckpointError>([&] { read(dir); },
                                "config.json: attention_bias: expected the value of qkv_bias "
                                "(false), got true");
}

TEST(Config, SlidingWindowsAreThoseOfTransformers) {
  struct Case {
    const char* architecture;
    json config;
    int64_t window;
  };
  const TempDir dir;
  const std::vector<Case> table = {
      {"LlamaForCausalLM", {{"sliding_window", 4096}}, 4096},
      {"LlamaForCausalLM", {{"sliding_window", 4096}, {"use_sliding_window", false}}, 0},
      {"LlamaForCausalLM", {{"use_sliding_window", true}}, 0},
      {"MistralForCausalLM", json::object(), 4096},
      {"MistralForCausalLM", {{"sliding_window", nullptr}}, 0},
      {"MistralForCausalLM", {{"sliding_window", 32768}}, 32768},
      {"Qwen2ForCausalLM", {{"sliding_window", 131072}}, 0},
      {"Qwen2ForCausalLM", {{"sliding_window", 131072}, {"use_sliding_window", true}}, 131072},
      {"Qwen3ForCausalLM", {{"sliding_window", nullptr}, {"use_sliding_window", false}}, 0},
  };
  for (const Case& c : table) {
    SCOPED_TRACE(message(c.architecture, " ", c.config.dump()));
    json config = llama();
    config["architectures"] = {c.architecture};
    config.update(c.config);
    dir.write("config.json", config.dump());
    EXPECT_EQ(read(dir).sliding_window, c.window);
  }
}

TEST(Config, RefusesFilesThatAreNotJson) {
  const TempDir dir;
  expect_throw<CheckpointError>([&] { read(dir); }, "got one without config.json");
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("\0\0", 2), std::string("{\"a\":\"\xFF\"}"),
        std::string("{\"a\":NaN}"), std::string("{\"a\":1e999}"), std::string("{} {}")}) {
    dir.write("config.json", text);
    expect_throw<CheckpointError>([&] { read(dir); }, "config.json: expected valid JSON");
  }
  dir.write("config.json", "[]");
  expect_throw<CheckpointError>([&] { read(dir); }, "config.json: expected an object");
  dir.write("config.json", std::string(100'000, '['));
  expect_throw<CheckpointError>([&] { read(dir); }, "config.json: expected at most 64 levels");
  dir.write("config.json", std::string((1 << 20) + 1, ' '));
  expect_throw<CheckpointError>([&] { read(dir); }, "expected at most 1048576 bytes, got 1048577");
}

}  // namespace
}  // namespace longspan
