#include "core/memory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <utility>

#include "longspan/error.h"

namespace longspan {
namespace {

TEST(AllocateHost, GivesZeroedAlignedMemory) {
  const Buffer buffer = allocate_host(12345);
  ASSERT_NE(buffer.data(), nullptr);
  EXPECT_EQ(buffer.bytes(), 12345);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % static_cast<uintptr_t>(getpagesize()), 0u);
  for (int64_t i = 0; i < buffer.bytes(); ++i) ASSERT_EQ(buffer.as<char>()[i], 0);
  buffer.as<char>()[12344] = 1;
}

TEST(AllocateHost, TakesPagesOnlyWhenTouched) {
  const int64_t before = available_host_bytes();
  const Buffer buffer = allocate_host(int64_t{1} << 40);  // more than the machine has
  buffer.as<char>()[int64_t{1} << 39] = 1;
  EXPECT_GT(available_host_bytes(), before / 2);
}

TEST(AllocateHost, MovesOwnership) {
  Buffer first = allocate_host(64);
  void* const data = first.data();
  const Buffer second = std::move(first);
  EXPECT_EQ(second.data(), data);
}

TEST(AllocateHost, NothingIsEmpty) { EXPECT_EQ(allocate_host(0).data(), nullptr); }

TEST(AllocateHost, RefusesWhatCannotBeMapped) {
  EXPECT_THROW(allocate_host(-1), InvalidArgument);
  try {
    allocate_host(int64_t{1} << 60);
    FAIL() << "mapped an exbibyte";
  } catch (const CapacityError& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("expected to map 1152921504606846976 bytes, got"), std::string::npos)
        << what;
    EXPECT_NE(what.find("Cannot allocate memory"), std::string::npos) << what;
  }
}

TEST(AvailableHostBytes, IsWithinTheMachine) {
  const int64_t physical = int64_t{sysconf(_SC_PHYS_PAGES)} * getpagesize();
  EXPECT_GT(available_host_bytes(), 0);
  EXPECT_LE(available_host_bytes(), physical);
}

}  // namespace
}  // namespace longspan
