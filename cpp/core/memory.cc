#include "core/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>

#include "core/cgroup.h"
#include "core/check.h"

namespace longspan {

Buffer allocate_host(int64_t bytes) {
  require<InvalidArgument>(bytes >= 0, "host memory: expected a size >= 0 bytes, got ", bytes);
  if (bytes == 0) return {};
  const auto size = static_cast<size_t>(bytes);
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    throw CapacityError(message("host memory: expected to map ", bytes, " bytes, got \"",
                                std::generic_category().message(error), "\" with ",
                                available_host_bytes(), " bytes available"));
  }
  madvise(data, size, MADV_HUGEPAGE);  // advice only; a kernel without huge pages refuses it
  return {data, bytes, [](void* p, int64_t n) { munmap(p, static_cast<size_t>(n)); }};
}

int64_t available_host_bytes() {
  int64_t available = std::numeric_limits<int64_t>::max();
  std::ifstream meminfo("/proc/meminfo");  // "MemAvailable:   24253648 kB"
  std::string key;
  std::string rest;
  while (meminfo >> key && key != "MemAvailable:") std::getline(meminfo, rest);
  int64_t kib;
  if (meminfo >> kib) available = kib * 1024;
  return std::min(available, read_cgroup_limits().available_bytes);
}

}  // namespace longspan
