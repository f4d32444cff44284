#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace longspan {

/// What the control groups (v1 or v2) of this process and their ancestors allow it.
struct CgroupLimits {
  double cpus = std::numeric_limits<double>::infinity();  ///< quota / period, the tightest
  /// Limit less use, the tightest; file pages count as free, since the kernel can drop them.
  int64_t available_bytes = std::numeric_limits<int64_t>::max();
};

/// membership: the file that lists the process's groups; root: where the hierarchies are mounted.
/// What cannot be read sets no limit.
CgroupLimits read_cgroup_limits(const std::string& membership = "/proc/self/cgroup",
                                const std::string& root = "/sys/fs/cgroup");

}  // namespace longspan
