#pragma once

#include <string>

#include "checkpoint/checkpoint.h"
#include "checkpoint/model_config.h"

namespace longspan {

/// What tells the keys and values of one model from those of another: a hash, in hex, of what its
/// config says of the computation, RoPE aside, and of names, dtypes, shapes and samples of all
/// tensors. Guards against mistakes, not against malice.
std::string fingerprint(const ModelConfig& config, const Checkpoint& checkpoint);

}  // namespace longspan
