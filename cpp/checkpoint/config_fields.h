#pragma once

#include <cstdint>

#include "checkpoint/json.h"

namespace longspan {

// The largest sizes a config may name, all well above any model there is. With them one tensor has
// fewer than 2^42 elements, a model fewer than 2^51, and one token's float32 keys and values in all
// layers take at most 2^31 bytes, so none of these products, nor the cache of one sequence of
// kMaxPositions tokens, overflows int64.
inline constexpr int64_t kMaxVocab = int64_t{1} << 24;
inline constexpr int64_t kMaxHidden = int64_t{1} << 18;  // also num_heads * head_dim
inline constexpr int64_t kMaxIntermediate = int64_t{1} << 20;
inline constexpr int64_t kMaxLayers = int64_t{1} << 10;
inline constexpr int64_t kMaxPositions = int64_t{1} << 28;

/// num_attention_heads.
int64_t read_num_heads(const JsonObject& config);

/// head_dim, else hidden_size / num_attention_heads; even, and num_heads * head_dim <= kMaxHidden.
int64_t read_head_dim(const JsonObject& config);

/// max_position_embeddings.
int64_t read_native_length(const JsonObject& config);

}  // namespace longspan
