#include "core/cgroup.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>

namespace longspan {
namespace {

/// The first number of a file; nothing when the file is missing or holds "max".
std::optional<double> read_number(const std::string& path) {
  std::ifstream file(path);
  double value;
  if (file >> value) return value;
  return std::nullopt;
}

/// A value of a file of "key value" lines, 0 when absent.
double read_field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  double value;
  while (file >> name >> value) {
    if (name == key) return value;
  }
  return 0;
}

void limit_cpus(CgroupLimits& limits, std::optional<double> quota, std::optional<double> period) {
  if (quota && period && *quota > 0 && *period > 0) {
    limits.cpus = std::min(limits.cpus, *quota / *period);
  }
}

void limit_memory(CgroupLimits& limits, std::optional<double> limit, std::optional<double> used,
                  double file_pages) {
  // Version 1 writes "no limit" as a number near 2^63.
  constexpr double kNoLimit = 0x1p60;
  if (!limit || !used || *limit >= kNoLimit) return;
  const double available = std::max(0.0, *limit - std::max(0.0, *used - file_pages));
  limits.available_bytes = std::min(limits.available_bytes, static_cast<int64_t>(available));
}

void read_v2(CgroupLimits& limits, const std::string& dir) {
  std::ifstream cpu_max(dir + "/cpu.max");  // "quota period" or "max period"
  double quota;
  double period;
  if (cpu_max >> quota >> period) limit_cpus(limits, quota, period);
  const std::string stat = dir + "/memory.stat";
  limit_memory(limits, read_number(dir + "/memory.max"), read_number(dir + "/memory.current"),
               read_field(stat, "inactive_file") + read_field(stat, "active_file"));
}

void read_v1_cpu(CgroupLimits& limits, const std::string& dir) {
  limit_cpus(limits, read_number(dir + "/cpu.cfs_quota_us"),
             read_number(dir + "/cpu.cfs_period_us"));
}

void read_v1_memory(CgroupLimits& limits, const std::string& dir) {
  const std::string stat = dir + "/memory.stat";
  limit_memory(limits, read_number(dir + "/memory.limit_in_bytes"),
               read_number(dir + "/memory.usage_in_bytes"),
               read_field(stat, "total_inactive_file") + read_field(stat, "total_active_file"));
}

/// Reads a group and its ancestors. A container may see its group mounted as the hierarchy's root
/// while membership still names the host's path, so directories that are absent are skipped.
template <class Read>
void read_ancestry(CgroupLimits& limits, const std::string& mount, std::string group, Read read) {
  for (;;) {
    while (!group.empty() && group.back() == '/') group.pop_back();
    read(limits, mount + group);
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return;
    group.resize(slash);
  }
}

}  // namespace

CgroupLimits read_cgroup_limits(const std::string& membership, const std::string& root) {
  CgroupLimits limits;
  std::ifstream file(membership);
  std::string line;
  while (std::getline(file, line)) {  // hierarchy-id:controller,...:path
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      read_ancestry(limits, root, group, read_v2);
      continue;
    }
    std::istringstream names(controllers);
    std::string name;
    while (std::getline(names, name, ',')) {
      if (name == "cpu") read_ancestry(limits, root + "/cpu", group, read_v1_cpu);
      if (name == "memory") read_ancestry(limits, root + "/memory", group, read_v1_memory);
    }
  }
  return limits;
}

}  // namespace longspan
