#pragma once

#include "checkpoint/json.h"
#include "rope/rope_method.h"

namespace longspan {

/// The RoPE part of a config.json. native_length and head_dim as in ModelConfig.
/// rope_scaling_factor: see EngineConfig. Throws CheckpointError, Unsupported or InvalidArgument.
RopeParameters read_rope(const JsonObject& config, int64_t head_dim, int64_t native_length,
                         double rope_scaling_factor);

}  // namespace longspan
