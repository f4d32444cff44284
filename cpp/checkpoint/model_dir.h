#pragma once

#include <string>

namespace longspan {

/// Whether the directory has a file of that name; what cannot be looked at is not there.
bool has_file(const std::string& model_dir, const std::string& name);

/// Throws CheckpointError unless path is a directory that holds a config.json.
void require_model_dir(const std::string& path);

/// Throws CheckpointError saying that there are no safetensors, and, where another format is there,
/// how to convert it.
[[noreturn]] void fail_without_weights(const std::string& model_dir);

}  // namespace longspan
