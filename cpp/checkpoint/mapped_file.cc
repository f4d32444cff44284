#include "checkpoint/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "core/check.h"

namespace longspan {
namespace {

[[noreturn]] void fail(const std::string& path, const char* expected) {
  throw CheckpointError(
      message(path, ": expected ", expected, ", got: ", std::generic_category().message(errno)));
}

/// Closes the descriptor; a mapping outlives it.
struct Descriptor {
  explicit Descriptor(int fd) : fd(fd) {}
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  const int fd;
};

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  // O_NONBLOCK: opening a pipe must not wait for a writer.
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.fd < 0) fail(path, "a readable file");
  struct stat status{};
  if (fstat(file.fd, &status) != 0) fail(path, "a readable file");
  require<CheckpointError>(S_ISREG(status.st_mode), path, ": expected a regular file");
  size_ = status.st_size;
  if (size_ == 0) return;
  void* mapped = mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (mapped == MAP_FAILED) fail(path, "a file that can be mapped");
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), static_cast<size_t>(size_));
}

void release_pages(const void* data, int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t into_page = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) % page;
  const int64_t skip = (page - into_page) % page;
  const int64_t whole = (bytes - skip) / page * page;
  // Only advice: where it fails, the pages merely stay.
  if (whole > 0) {
    auto* first = static_cast<std::byte*>(const_cast<void*>(data)) + skip;
    madvise(first, static_cast<size_t>(whole), MADV_DONTNEED);
  }
}

}  // namespace longspan
