#include "checkpoint/model_dir.h"

#include <filesystem>

#include "core/check.h"

namespace longspan {
namespace {

namespace fs = std::filesystem;

/// The first file of the directory with the extension, or nothing.
std::string file_with(const fs::path& directory, const char* extension) {
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == extension) return it->path().filename().string();
  }
  return {};
}

constexpr const char* kExpected = "expected a directory with config.json and safetensors weights";

}  // namespace

bool has_file(const std::string& model_dir, const std::string& name) {
  std::error_code ignored;
  return fs::exists(fs::path(model_dir) / name, ignored);
}

void require_model_dir(const std::string& path) {
  std::error_code error;
  require<CheckpointError>(fs::is_directory(path, error), path, ": ", kExpected, ", got ",
                           fs::exists(path, error) ? "a file" : "nothing");
  require<CheckpointError>(has_file(path, "config.json"), path, ": ", kExpected,
                           ", got one without config.json");
}

void fail_without_weights(const std::string& model_dir) {
  std::string got = "neither";
  std::string remedy;
  if (const std::string gguf = file_with(model_dir, ".gguf"); !gguf.empty()) {
    got = gguf;
    remedy = "; give longspan.pipeline the path of that file, it converts it";
  } else if (const std::string bin = file_with(model_dir, ".bin"); !bin.empty()) {
    got = bin;
    remedy =
        "; longspan.pipeline reads it with use_safetensors=False, without running what it holds";
  }
  throw CheckpointError(message(model_dir,
                                ": expected model.safetensors or model.safetensors.index.json, "
                                "got ",
                                got, remedy));
}

}  // namespace longspan
