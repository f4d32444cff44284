#pragma once

#include "model/architecture.h"

namespace longspan {

/// The tensors of a family that Hugging Face lays out as its Llama: separate q, k, v and gate, up.
/// What ModelConfig says of biases and of the norm of q and k decides which tensors there are.
class HfLayout : public Architecture {
 public:
  OuterTensors outer(const ModelConfig& config, const Checkpoint& checkpoint) const override;
  LayerTensors layer(const ModelConfig& config, const Checkpoint& checkpoint,
                     int64_t index) const override;
  bool ignores(const ModelConfig& config, std::string_view tensor) const override;
};

}  // namespace longspan
