#include "support/tiny_llama.h"

#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

namespace longspan::test {
namespace {

using Json = nlohmann::ordered_json;

/// Collects tensors and writes them as one safetensors file.
class Writer {
 public:
  void add(const std::string& name, const std::vector<int64_t>& shape, float mean, float spread) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    const size_t begin = values_.size();
    std::normal_distribution<float> normal(mean, spread);
    for (int64_t i = 0; i < count; ++i) values_.push_back(normal(random_));
    header_[name] = {
        {"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin * 4, values_.size() * 4}}};
  }

  void poison() { values_.back() = std::numeric_limits<float>::quiet_NaN(); }

  void write(const std::filesystem::path& path) const {
    std::string header = header_.dump();
    header.resize((header.size() + 7) / 8 * 8, ' ');  // keeps the data aligned
    const uint64_t size = header.size();
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&size), sizeof(size));
    out << header;
    out.write(reinterpret_cast<const char*>(values_.data()),
              static_cast<std::streamsize>(values_.size() * sizeof(float)));
  }

 private:
  std::mt19937 random_{11};
  Json header_;
  std::vector<float> values_;
};

void write_config(const TinyLlama& m, const std::filesystem::path& path) {
  Json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"vocab_size", m.vocab_size},
                 {"hidden_size", m.hidden_size},
                 {"intermediate_size", m.intermediate_size},
                 {"num_hidden_layers", m.num_layers},
                 {"num_attention_heads", m.num_heads},
                 {"num_key_value_heads", m.num_kv_heads},
                 {"head_dim", m.head_dim},
                 {"max_position_embeddings", m.max_position_embeddings},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000.0},
                 {"hidden_act", "silu"},
                 {"tie_word_embeddings", m.tied}};
  if (m.eos >= 0) config["eos_token_id"] = m.eos;
  std::ofstream(path) << config.dump(1);
}

}  // namespace

ModelDir::ModelDir(const TinyLlama& m) {
  static std::atomic<int> count = 0;
  path_ = std::filesystem::temp_directory_path() /
          ("longspan-tiny-" + std::to_string(getpid()) + "-" + std::to_string(count++));
  std::filesystem::create_directories(path_);
  write_config(m, path_ / "config.json");
  Writer writer;
  const auto matrix = [&](const std::string& name, int64_t out, int64_t in) {
    writer.add(name + ".weight", {out, in}, 0.0F, 1.0F / std::sqrt(static_cast<float>(in)));
  };
  const auto norm = [&](const std::string& name) {
    writer.add(name + ".weight", {m.hidden_size}, 1.0F, 0.1F);
  };
  matrix("model.embed_tokens", m.vocab_size, m.hidden_size);
  for (int64_t i = 0; i < m.num_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    norm(layer + "input_layernorm");
    matrix(layer + "self_attn.q_proj", m.num_heads * m.head_dim, m.hidden_size);
    matrix(layer + "self_attn.k_proj", m.num_kv_heads * m.head_dim, m.hidden_size);
    matrix(layer + "self_attn.v_proj", m.num_kv_heads * m.head_dim, m.hidden_size);
    matrix(layer + "self_attn.o_proj", m.hidden_size, m.num_heads * m.head_dim);
    norm(layer + "post_attention_layernorm");
    matrix(layer + "mlp.gate_proj", m.intermediate_size, m.hidden_size);
    matrix(layer + "mlp.up_proj", m.intermediate_size, m.hidden_size);
    matrix(layer + "mlp.down_proj", m.hidden_size, m.intermediate_size);
  }
  if (!m.tied) matrix("lm_head", m.vocab_size, m.hidden_size);
  norm("model.norm");
  if (m.poisoned) writer.poison();
  writer.write(path_ / "model.safetensors");
}

ModelDir::~ModelDir() {
  std::error_code ignored;  // a destructor has nobody to tell
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace longspan::test
