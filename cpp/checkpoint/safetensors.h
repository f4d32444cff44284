#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/mapped_file.h"

namespace longspan {

/// A tensor of a safetensors file: row-major, little-endian, `bytes` bytes at `data`.
struct SafetensorsEntry {
  std::string dtype;           ///< as in the file: "F32", "BF16", ...
  std::vector<int64_t> shape;  ///< each >= 0
  const std::byte* data = nullptr;
  int64_t bytes = 0;
};

/// One safetensors file, mapped. Layout: uint64 N, little-endian; N bytes of JSON,
/// {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__"}; then the data,
/// which the tensors cover without gap or overlap
/// (https://huggingface.co/docs/safetensors, "Format").
class SafetensorsFile {
 public:
  /// Throws CheckpointError naming the file, the tensor and what is wrong; once opened, every entry
  /// lies inside the file and is as large as its dtype and shape say.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return path_; }
  int64_t bytes() const { return file_.size(); }  ///< of the whole file
  const std::map<std::string, SafetensorsEntry>& tensors() const { return tensors_; }
  /// What the writer said of the file: "__metadata__".
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  const std::string path_;
  const MappedFile file_;
  std::map<std::string, SafetensorsEntry> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace longspan
