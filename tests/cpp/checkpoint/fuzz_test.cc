// Deterministic mutation fuzzing of everything a model directory can hold. Each mutant must either
// load or throw longspan::Error; every byte of every tensor it loads must be readable. Meant to run
// under ASan and UBSan. LONGSPAN_FUZZ_ROUNDS sets the number of mutants per test.

#include <cmath>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "checkpoint/model_config.h"
#include "checkpoint/safetensors.h"
#include "longspan/error.h"
#include "model/architecture.h"

namespace longspan {
namespace {

using test::TempDir;

int rounds() {
  const char* text = std::getenv("LONGSPAN_FUZZ_ROUNDS");
  return text == nullptr ? 2000 : std::atoi(text);
}

/// Breaks texts in the ways that files break and attackers break them.
class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  /// One to four mutations of `text`; `other` lends pieces.
  std::string mutate(std::string text, const std::string& other) {
    const size_t count = 1 + below(4);
    for (size_t i = 0; i < count; ++i) mutate_once(text, other);
    return text;
  }

 private:
  size_t below(size_t n) { return n == 0 ? 0 : random_() % n; }

  void mutate_once(std::string& text, const std::string& other) {
    const size_t at = below(text.size());
    switch (below(9)) {
      case 0:  // flip a bit
        if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 1:  // truncate
        text.resize(at);
        break;
      case 2:  // remove a piece
        text.erase(at, 1 + below(16));
        break;
      case 3:  // repeat a piece
        text.insert(at, text.substr(below(text.size()), 1 + below(64)));
        break;
      case 4:  // splice in a piece of another file
        text.insert(at, other.substr(below(other.size()), 1 + below(64)));
        break;
      case 5:  // a random byte
        if (!text.empty()) text[at] = static_cast<char>(below(256));
        break;
      case 6:  // the length field of a safetensors file
        edit_length(text);
        break;
      case 7:  // a number
        replace_number(text);
        break;
      default:  // JSON's own marks
        text.insert(at, 1, "{}[]\",:0-e.\\"[below(12)]);
    }
  }

  void edit_length(std::string& text) {
    if (text.size() < 8) return;
    uint64_t length = 0;
    std::memcpy(&length, text.data(), 8);
    const uint64_t choices[] = {
        length + 1,  length - 1,     0, uint64_t{1} << below(64), ~uint64_t{0},
        text.size(), text.size() - 8};
    length = choices[below(std::size(choices))];
    std::memcpy(text.data(), &length, 8);
  }

  void replace_number(std::string& text) {
    constexpr const char* kNumbers = "0123456789";
    const size_t begin = text.find_first_of(kNumbers, below(text.size()));
    if (begin == std::string::npos) return;
    const size_t end = std::min(text.find_first_not_of(kNumbers, begin), text.size());
    static constexpr const char* kChoices[] = {"0",
                                               "1",
                                               "-1",
                                               "2",
                                               "3.5",
                                               "1e9",
                                               "1e999",
                                               "4294967296",
                                               "9223372036854775807",
                                               "9223372036854775808",
                                               "18446744073709551615",
                                               "null",
                                               "true",
                                               "\"1\"",
                                               "[]",
                                               "{}"};
    text.replace(begin, end - begin, kChoices[below(std::size(kChoices))]);
  }

  std::mt19937 random_;
};

/// A file with tensors of several dtypes, an empty one and a scalar.
std::string valid_safetensors() {
  std::string header =
      R"({"__metadata__":{"format":"pt"},)"
      R"("model.embed_tokens.weight":{"dtype":"F32","shape":[5,4],"data_offsets":[0,80]},)"
      R"("model.norm.weight":{"dtype":"BF16","shape":[4],"data_offsets":[80,88]},)"
      R"("empty":{"dtype":"F16","shape":[0,3],"data_offsets":[88,88]},)"
      R"("scalar":{"dtype":"I64","shape":[],"data_offsets":[88,96]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return test::safetensors(header, std::string(96, '\x3C'));
}

constexpr const char* kConfig =
    R"({"architectures":["LlamaForCausalLM"],"vocab_size":97,"hidden_size":48,)"
    R"("intermediate_size":80,"num_hidden_layers":2,"num_attention_heads":6,)"
    R"("num_key_value_heads":2,"head_dim":8,"max_position_embeddings":64,"rms_norm_eps":1e-5,)"
    R"("rope_parameters":{"rope_type":"dynamic","factor":2.5,"rope_theta":10000.0},)"
    R"("hidden_act":"silu","tie_word_embeddings":true,"eos_token_id":[2,3],)"
    R"("sliding_window":null,"layer_types":["full_attention","full_attention"]})";

constexpr const char* kIndex =
    R"({"metadata":{"total_size":96},"weight_map":{)"
    R"("model.embed_tokens.weight":"a.safetensors","model.norm.weight":"a.safetensors"}})";

volatile unsigned char sink;

/// Reads the first and every following byte, so that ASan sees each.
void read_all(const std::byte* data, int64_t bytes) {
  unsigned char sum = 0;
  for (int64_t i = 0; i < bytes; ++i) sum ^= static_cast<unsigned char>(data[i]);
  sink = sum;
}

/// Runs `load` on many mutants of `valid`; counts how many loaded.
void fuzz(uint32_t seed, const std::string& valid, const std::string& other,
          const std::function<void(const std::string&)>& load) {
  load(valid);
  Mutator mutator(seed);
  int loaded = 0;
  int refused = 0;
  for (int i = 0; i < rounds(); ++i) {
    const std::string mutant = mutator.mutate(valid, other);
    SCOPED_TRACE(i);
    try {
      load(mutant);
      ++loaded;
    } catch (const Error& error) {
      ++refused;
      // Messages reach Python as UTF-8.
      EXPECT_NO_THROW(nlohmann::json(error.what()).dump()) << error.what();
    }
  }
  // A fuzzer whose mutants all fare alike tests little.
  EXPECT_GT(loaded, 0);
  EXPECT_GT(refused, rounds() / 10);
}

TEST(Fuzz, Safetensors) {
  const TempDir dir;
  fuzz(1, valid_safetensors(), kConfig, [&](const std::string& bytes) {
    const SafetensorsFile file(dir.write("x.safetensors", bytes));
    for (const auto& [name, entry] : file.tensors()) read_all(entry.data, entry.bytes);
  });
}

TEST(Fuzz, SafetensorsHeader) {
  const TempDir dir;
  const std::string valid = valid_safetensors();
  const std::string header = valid.substr(8, valid.size() - 8 - 96);
  fuzz(2, header, kIndex, [&](const std::string& text) {
    const SafetensorsFile file(
        dir.write("x.safetensors", test::safetensors(text, valid.substr(valid.size() - 96))));
    for (const auto& [name, entry] : file.tensors()) read_all(entry.data, entry.bytes);
  });
}

TEST(Fuzz, Checkpoint) {
  const TempDir dir;
  dir.write("config.json", kConfig);
  fuzz(3, valid_safetensors(), kIndex, [&](const std::string& bytes) {
    dir.write("model.safetensors", bytes);
    const auto checkpoint = Checkpoint::open(dir.path());
    const WeightView embedding = checkpoint->tensor("model.embed_tokens.weight", 5, 4);
    const WeightView norm = checkpoint->tensor("model.norm.weight", 1, 4);
    check_finite(embedding);
    check_finite(norm);
    checkpoint->release(embedding);
    read_all(static_cast<const std::byte*>(norm.data), 8);
  });
}

TEST(Fuzz, Index) {
  const TempDir dir;
  dir.write("config.json", kConfig);
  dir.write("a.safetensors", valid_safetensors());
  fuzz(4, kIndex, kConfig, [&](const std::string& text) {
    dir.write("model.safetensors.index.json", text);
    const auto checkpoint = Checkpoint::open(dir.path());
    for (const std::string& name : checkpoint->names()) {
      EXPECT_TRUE(checkpoint->contains(name));
    }
  });
}

TEST(Fuzz, Config) {
  const TempDir dir;
  fuzz(5, kConfig, kIndex, [&](const std::string& text) {
    dir.write("config.json", text);
    const ModelConfig m = read_model_config(dir.path(), "", 0.0, config_dialect);
    EXPECT_GT(m.num_layers, 0);
    EXPECT_EQ(m.num_heads % m.num_kv_heads, 0);
    EXPECT_GT(m.vocab_size * m.hidden_size, 0);
    const RopeProfile profile = make_rope_method(m.rope)->profile(1000);
    EXPECT_EQ(static_cast<int64_t>(profile.inv_freq.size()), m.rope.rotary_dim / 2);
    EXPECT_LE(m.rope.rotary_dim, m.head_dim);
  });
}

TEST(Fuzz, RopeDictionaries) {
  constexpr const char* kDictionaries[] = {
      R"({"type":"yarn","factor":4.0,"original_max_position_embeddings":16,"beta_fast":32,)"
      R"("beta_slow":1,"mscale":0.7,"mscale_all_dim":1.0,"truncate":false})",
      R"({"rope_type":"yarn","factor":"auto","attention_factor":1.2,"partial_rotary_factor":0.5})",
      R"({"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,)"
      R"("original_max_position_embeddings":32})",
      R"({"rope_type":"longrope","short_factor":[1,1.1,1.2,1.5],"long_factor":[1,2.5,4e0,9],)"
      R"("factor":null,"attention_factor":1.19})",
      R"({"rope_type":"proportional","partial_rotary_factor":0.5,"rope_theta":1e6})"};
  uint32_t seed = 7;
  for (const char* dictionary : kDictionaries) {
    const auto parse = [](const std::string& text) {
      const RopeProfile profile = rope_profile_from_config(
          R"({"hidden_size":48,"num_attention_heads":6,"max_position_embeddings":64,)"
          R"("original_max_position_embeddings":null,"use_logn_attn":true,"rope_scaling":)" +
              text + "}",
          1000);
      EXPECT_LE(profile.inv_freq.size(), 4U);
      for (const double frequency : profile.inv_freq) {
        EXPECT_TRUE(std::isfinite(frequency) && frequency >= 0.0);
      }
      EXPECT_TRUE(std::isfinite(profile.attention_factor) && profile.attention_factor > 0.0);
    };
    fuzz(seed++, dictionary, kConfig, parse);
  }
}

TEST(Fuzz, Overrides) {
  const TempDir dir;
  dir.write("config.json", kConfig);
  fuzz(6, R"({"rope_parameters":{"factor":4.0},"max_position_embeddings":128,"mlp_bias":null})",
       kConfig,
       [&](const std::string& text) { read_model_config(dir.path(), text, 0.0, config_dialect); });
}

}  // namespace
}  // namespace longspan
