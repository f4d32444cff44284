#include "checkpoint/config_fields.h"

#include "core/check.h"

namespace longspan {

int64_t read_num_heads(const JsonObject& config) {
  return config.integer("num_attention_heads", 1, kMaxHidden);
}

int64_t read_head_dim(const JsonObject& config) {
  const int64_t num_heads = read_num_heads(config);
  const bool given = config.has("head_dim");
  const int64_t total = given ? config.integer("head_dim", 1, kMaxHidden) * num_heads
                              : config.integer("hidden_size", 1, kMaxHidden);
  require<CheckpointError>(total % num_heads == 0, config.where(),
                           ": hidden_size: expected a multiple of num_attention_heads (", num_heads,
                           ") or a head_dim, got ", total);
  const int64_t head_dim = total / num_heads;
  require<CheckpointError>(head_dim % 2 == 0, config.where(),
                           ": head_dim: expected an even number, got ", head_dim);
  require<CheckpointError>(total <= kMaxHidden, config.where(),
                           ": num_attention_heads * head_dim: expected at most ", kMaxHidden,
                           ", got ", total);
  return head_dim;
}

int64_t read_native_length(const JsonObject& config) {
  return config.integer("max_position_embeddings", 1, kMaxPositions);
}

}  // namespace longspan
