#include "checkpoint/checkpoint.h"

#include <filesystem>
#include <map>
#include <utility>

#include "checkpoint/json.h"
#include "checkpoint/model_dir.h"
#include "checkpoint/safetensors.h"
#include "core/check.h"

namespace longspan {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr int64_t kMaxIndexBytes = int64_t{1} << 26;  // several times the largest there is

struct Located {
  const SafetensorsFile* file;
  const SafetensorsEntry* entry;
};

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return shortened(text) + "]";
}

DType dtype_of(const std::string& name, const SafetensorsEntry& entry) {
  if (entry.dtype == "F32") return DType::kF32;
  if (entry.dtype == "F16") return DType::kF16;
  if (entry.dtype == "BF16") return DType::kBF16;
  throw CheckpointError(message(name, ": expected dtype F32, F16 or BF16, got ", entry.dtype));
}

/// A name that cannot leave the model's directory.
bool is_plain_name(const std::string& name) {
  constexpr std::string_view kForbidden("/\\\0", 3);
  return name.ends_with(".safetensors") && name.find_first_of(kForbidden) == std::string::npos;
}

class SafetensorsCheckpoint final : public Checkpoint {
 public:
  explicit SafetensorsCheckpoint(const std::string& directory) {
    if (has_file(directory, kSingle)) {
      const SafetensorsFile& file = open_file(directory, kSingle);
      for (const auto& [name, entry] : file.tensors()) tensors_[name] = {&file, &entry};
    } else if (has_file(directory, kIndex)) {
      open_shards(directory);
    } else {
      fail_without_weights(directory);
    }
  }

  bool contains(const std::string& name) const override { return tensors_.contains(name); }

  std::vector<std::string> names() const override {
    std::vector<std::string> all;
    all.reserve(tensors_.size());
    for (const auto& [name, located] : tensors_) all.push_back(name);
    return all;
  }

  WeightView tensor(const std::string& name, int64_t rows, int64_t cols) const override {
    const Located& located = find(name);
    const SafetensorsEntry& entry = *located.entry;
    const std::string where = located.file->path() + ": " + name;
    const DType dtype = dtype_of(where, entry);
    const std::vector<int64_t> vector = {cols};
    const std::vector<int64_t> matrix = {rows, cols};
    require<CheckpointError>(entry.shape == matrix || (rows == 1 && entry.shape == vector), where,
                             ": expected shape ", text_of(rows == 1 ? vector : matrix), ", got ",
                             text_of(entry.shape));
    // Every writer pads the header and sorts by dtype, so that this holds.
    require<CheckpointError>(reinterpret_cast<uintptr_t>(entry.data) % size_of(dtype) == 0, where,
                             ": expected data aligned to ", size_of(dtype),
                             " bytes; save the file again with a current safetensors");
    return {entry.data, dtype, rows, cols, cols, name};
  }

  RawTensor raw(const std::string& name) const override {
    const SafetensorsEntry& entry = *find(name).entry;
    return {entry.dtype, entry.shape, {entry.data, static_cast<size_t>(entry.bytes)}};
  }

  void release(const WeightView& tensor) const override {
    const int64_t elements = (tensor.rows - 1) * tensor.stride + tensor.cols;
    release_pages(tensor.data, elements * size_of(tensor.dtype));
  }

 private:
  const Located& find(const std::string& name) const {
    const auto found = tensors_.find(name);
    require<CheckpointError>(found != tensors_.end(), "checkpoint: expected a tensor ", name,
                             ", got none");
    return found->second;
  }

  const SafetensorsFile& open_file(const fs::path& directory, const std::string& name) {
    auto& file = files_[name];
    if (file == nullptr) file = std::make_unique<SafetensorsFile>((directory / name).string());
    return *file;
  }

  void open_shards(const fs::path& directory) {
    const std::string path = (directory / kIndex).string();
    const Json json = parse_json(read_text_file(path, kMaxIndexBytes), path);
    const JsonObject index(json, path);
    const Json* map = index.find("weight_map");
    if (map == nullptr || !map->is_object()) index.fail("weight_map", "an object");
    const JsonObject weight_map(*map, path + ": weight_map");
    for (const auto& [name, value] : map->items()) {
      if (!value.is_string() || !is_plain_name(value.get_ref<const std::string&>())) {
        weight_map.fail(name, "the name of a .safetensors file in the same directory");
      }
      const SafetensorsFile& file = open_file(directory, value.get_ref<const std::string&>());
      const auto found = file.tensors().find(name);
      require<CheckpointError>(found != file.tensors().end(), file.path(), ": expected tensor \"",
                               shortened(name), "\", as ", kIndex, " says, got none");
      tensors_[name] = {&file, &found->second};
    }
  }

  std::map<std::string, std::unique_ptr<SafetensorsFile>> files_;  // by name in the directory
  std::map<std::string, Located> tensors_;
};

}  // namespace

std::unique_ptr<Checkpoint> Checkpoint::open(const std::string& model_dir) {
  require_model_dir(model_dir);
  return std::make_unique<SafetensorsCheckpoint>(model_dir);
}

}  // namespace longspan
