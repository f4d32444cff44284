#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/model_config.h"

namespace longspan {

/// A linear's weights in a checkpoint, whole: parts stack along the output rows. bias is empty or
/// has one vector per part.
struct LinearTensors {
  std::vector<WeightView> parts;
  std::vector<WeightView> bias;
};

/// One decoder layer's tensors, whole (no rank's slice yet).
struct LayerTensors {
  WeightView input_norm;           ///< [hidden_size]
  LinearTensors q, k, v;           ///< [heads * head_dim, hidden_size], heads in order
  LinearTensors o;                 ///< [hidden_size, num_heads * head_dim]
  WeightView q_norm, k_norm;       ///< [head_dim]; data is null where heads are not normed
  WeightView post_attention_norm;  ///< [hidden_size]
  LinearTensors gate, up;          ///< [intermediate_size, hidden_size]
  LinearTensors down;              ///< [hidden_size, intermediate_size]
};

/// The tensors around the layers.
struct OuterTensors {
  WeightView embedding;   ///< [vocab_size, hidden_size]
  WeightView final_norm;  ///< [hidden_size]
  WeightView head;        ///< [vocab_size, hidden_size]; data is null when tied to the embedding
};

/// A family of models: what its config.json means and where its tensors are. The forward pass is
/// common to all (decoder.h).
class Architecture {
 public:
  virtual ~Architecture() = default;
  virtual std::string_view name() const = 0;  ///< config.json's architectures[0]
  virtual ConfigDialect dialect() const = 0;
  virtual OuterTensors outer(const ModelConfig& config, const Checkpoint& checkpoint) const = 0;
  virtual LayerTensors layer(const ModelConfig& config, const Checkpoint& checkpoint,
                             int64_t index) const = 0;
  /// True for a tensor that checkpoints of this family carry and no forward pass needs.
  virtual bool ignores(const ModelConfig& config, std::string_view tensor) const = 0;
};

/// Throws Unsupported, listing the known families.
const Architecture& find_architecture(std::string_view name);

/// What the family's config.json means. Throws as find_architecture.
ConfigDialect config_dialect(std::string_view name);

const Architecture& internlm2_architecture();
const Architecture& internlm3_architecture();
const Architecture& llama_architecture();
const Architecture& mistral_architecture();
const Architecture& qwen2_architecture();
const Architecture& qwen3_architecture();

}  // namespace longspan
