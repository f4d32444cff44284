#include "core/cgroup.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

namespace longspan {
namespace {

constexpr int64_t kNoBytes = std::numeric_limits<int64_t>::max();

/// A made-up /sys/fs/cgroup and /proc/self/cgroup.
class Cgroup : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing::TempDir() + "longspan_cgroup_" +
           testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = dir_ + "/" + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  CgroupLimits limits() { return read_cgroup_limits(dir_ + "/membership", dir_ + "/root"); }

  std::string dir_;
};

TEST_F(Cgroup, NoFilesNoLimit) {
  EXPECT_TRUE(std::isinf(limits().cpus));
  EXPECT_EQ(limits().available_bytes, kNoBytes);
}

TEST_F(Cgroup, Version2TakesTheTightestAncestor) {
  write("membership", "0::/user/job\n");
  write("root/user/job/cpu.max", "400000 100000\n");
  write("root/user/cpu.max", "150000 100000\n");
  write("root/user/job/memory.max", "1000000\n");
  write("root/user/job/memory.current", "700000\n");
  write("root/user/job/memory.stat", "anon 400000\ninactive_file 200000\nactive_file 100000\n");
  write("root/user/memory.max", "max\n");
  write("root/user/memory.current", "700000\n");
  EXPECT_DOUBLE_EQ(limits().cpus, 1.5);
  EXPECT_EQ(limits().available_bytes, 1000000 - 400000);
}

TEST_F(Cgroup, Version2WithoutLimits) {
  write("membership", "0::/\n");
  write("root/cpu.max", "max 100000\n");
  write("root/memory.max", "max\n");
  write("root/memory.current", "700000\n");
  EXPECT_TRUE(std::isinf(limits().cpus));
  EXPECT_EQ(limits().available_bytes, kNoBytes);
}

TEST_F(Cgroup, Version1) {
  write("membership", "5:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/job\n");
  write("root/cpu/job/cpu.cfs_quota_us", "300000\n");
  write("root/cpu/job/cpu.cfs_period_us", "100000\n");
  write("root/cpu/cpu.cfs_quota_us", "-1\n");
  write("root/cpu/cpu.cfs_period_us", "100000\n");
  write("root/memory/job/memory.limit_in_bytes", "2000000\n");
  write("root/memory/job/memory.usage_in_bytes", "500000\n");
  write("root/memory/job/memory.stat", "inactive_file 7\ntotal_inactive_file 100000\n");
  write("root/memory/memory.limit_in_bytes", "9223372036854771712\n");
  write("root/memory/memory.usage_in_bytes", "500000\n");
  EXPECT_DOUBLE_EQ(limits().cpus, 3.0);
  EXPECT_EQ(limits().available_bytes, 2000000 - 400000);
}

TEST_F(Cgroup, ContainerSeesItsGroupAtTheRoot) {
  write("membership", "5:memory:/docker/0123\n4:cpu:/docker/0123\n");
  write("root/cpu/cpu.cfs_quota_us", "200000\n");
  write("root/cpu/cpu.cfs_period_us", "100000\n");
  write("root/memory/memory.limit_in_bytes", "1000\n");
  write("root/memory/memory.usage_in_bytes", "5000\n");  // over its limit: nothing is left
  EXPECT_DOUBLE_EQ(limits().cpus, 2.0);
  EXPECT_EQ(limits().available_bytes, 0);
}

TEST_F(Cgroup, GarbageSetsNoLimit) {
  write("membership", "\n:\nnonsense\n0::/a//b/\n");
  write("root/cpu.max", "lots of it\n");
  write("root/memory.max", "\n");
  EXPECT_TRUE(std::isinf(limits().cpus));
  EXPECT_EQ(limits().available_bytes, kNoBytes);
}

}  // namespace
}  // namespace longspan
