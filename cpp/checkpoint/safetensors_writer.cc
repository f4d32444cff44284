#include "checkpoint/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "checkpoint/json.h"
#include "core/check.h"

namespace longspan {
namespace {

/// The length of the header's text, then the text, padded so that the data begins at a multiple of
/// eight.
std::string header_of(const std::vector<SafetensorsSpec>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  Json header = {{"__metadata__", metadata}};
  int64_t begin = 0;
  for (const SafetensorsSpec& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {begin, begin + tensor.bytes}}};
    begin += tensor.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t size = text.size();
  std::string prefix(sizeof(size), '\0');
  std::memcpy(prefix.data(), &size, sizeof(size));
  return prefix + text;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::string& path,
                                     const std::vector<SafetensorsSpec>& tensors,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path), part_(path + ".part") {
  const std::string header = header_of(tensors, metadata);
  bytes_ = std::ssize(header);
  for (const SafetensorsSpec& tensor : tensors) {
    begins_.push_back(bytes_);
    bytes_ += tensor.bytes;
  }
  fd_ = open(part_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail("a file that can be written");
  try {
    // Where the file system cannot say beforehand, a write will.
    if (fallocate(fd_, 0, 0, bytes_) != 0 && errno != EOPNOTSUPP) fail("room for the file");
    if (ftruncate(fd_, bytes_) != 0) fail("a file that can be written");
    write_at(0, std::as_bytes(std::span(header)));
  } catch (...) {
    close(fd_);
    unlink(part_.c_str());
    throw;
  }
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(part_.c_str());
}

void SafetensorsWriter::fail(const char* what) const {
  throw CheckpointError(message(part_, ": expected ", what, " (", bytes_,
                                " bytes), got: ", std::generic_category().message(errno)));
}

void SafetensorsWriter::write_at(int64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = pwrite(fd_, bytes.data(), bytes.size(), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail("room for the file");
    offset += written;
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
}

void SafetensorsWriter::write(size_t index, int64_t offset, std::span<const std::byte> bytes) {
  write_at(begins_.at(index) + offset, bytes);
}

void SafetensorsWriter::finish() {
  if (fsync(fd_) != 0) fail("a file that can be written");
  if (std::rename(part_.c_str(), path_.c_str()) != 0) fail("a path that can be written");
  close(fd_);
  fd_ = -1;
}

}  // namespace longspan
