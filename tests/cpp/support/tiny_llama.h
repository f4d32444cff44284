#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace longspan::test {

/// The shape of a small random Llama checkpoint.
struct TinyLlama {
  int64_t vocab_size = 97;
  int64_t hidden_size = 48;
  int64_t intermediate_size = 80;
  int64_t num_layers = 2;
  int64_t num_heads = 6;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 8;
  int64_t max_position_embeddings = 64;
  bool tied = true;
  int32_t eos = -1;       ///< < 0: the model has none
  bool poisoned = false;  ///< a NaN in the last tensor
};

/// A model directory in the test's temporary directory, removed with the object.
class ModelDir {
 public:
  /// Writes config.json and model.safetensors (float32, seeded random values).
  explicit ModelDir(const TinyLlama& shape = {});
  ~ModelDir();
  ModelDir(const ModelDir&) = delete;
  ModelDir& operator=(const ModelDir&) = delete;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace longspan::test
