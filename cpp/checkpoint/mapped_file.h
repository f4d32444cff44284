#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace longspan {

/// A regular file mapped read-only. The file must not shrink while it is mapped.
class MappedFile {
 public:
  /// Throws CheckpointError when the file is absent, not a regular file or cannot be mapped.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }  ///< page-aligned; null for an empty file
  int64_t size() const { return size_; }           ///< bytes

 private:
  const std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

/// Gives back the resident pages that lie wholly inside mapped memory [data, data + bytes). Reading
/// it again reads the file again.
void release_pages(const void* data, int64_t bytes);

}  // namespace longspan
