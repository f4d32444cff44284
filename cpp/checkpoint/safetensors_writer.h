#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace longspan {

/// A tensor that a file is to hold.
struct SafetensorsSpec {
  std::string name;
  std::string dtype;           ///< as in the file: "F32", "BF16", ...
  std::vector<int64_t> shape;  ///< each >= 0
  int64_t bytes = 0;           ///< that dtype and shape come to
};

/// Writes one safetensors file (see SafetensorsFile) piece by piece, in any order. Until finish()
/// it is `path`.part; without finish() nothing is left. What is never written is zero.
class SafetensorsWriter {
 public:
  /// Tensors lie in the order given: those of wider dtypes are to come first, so that all are
  /// aligned. Takes the room on the disk. Throws CheckpointError where the file cannot be made or
  /// does not fit.
  SafetensorsWriter(const std::string& path, const std::vector<SafetensorsSpec>& tensors,
                    const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// Bytes from `offset` on of tensor number `index`. Throws CheckpointError.
  void write(size_t index, int64_t offset, std::span<const std::byte> bytes);

  /// Has the file on the disk, under its name; what was there before is gone. Throws
  /// CheckpointError.
  void finish();

  int64_t bytes() const { return bytes_; }  ///< of the whole file

 private:
  [[noreturn]] void fail(const char* what) const;
  void write_at(int64_t offset, std::span<const std::byte> bytes);

  const std::string path_;
  const std::string part_;
  int fd_ = -1;
  std::vector<int64_t> begins_;  // [tensors], in the file
  int64_t bytes_ = 0;
};

}  // namespace longspan
