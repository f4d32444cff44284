#include "backend/registry.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "backend/cpu/kernels.h"
#include "longspan/backends.h"
#include "longspan/error.h"

namespace longspan {
namespace {

/// Sets LONGSPAN_CPU_ISA as long as it lives.
class ChosenIsa {
 public:
  explicit ChosenIsa(const std::string& name) {
    if (const char* old = std::getenv(kName)) old_ = old;
    setenv(kName, name.c_str(), 1);
  }
  ~ChosenIsa() { setenv(kName, old_.c_str(), 1); }
  ChosenIsa(const ChosenIsa&) = delete;
  ChosenIsa& operator=(const ChosenIsa&) = delete;

 private:
  static constexpr const char* kName = "LONGSPAN_CPU_ISA";
  std::string old_;
};

TEST(Registry, MakesTheCpuAsAsked) {
  const auto backend = make_backend("auto", "float32", 3);
  EXPECT_EQ(backend->activation_dtype(), DType::kF32);
  EXPECT_NE(backend->describe().find("3 threads"), std::string::npos) << backend->describe();
  EXPECT_EQ(make_backend("cpu", "bfloat16", 1)->activation_dtype(), DType::kBF16);
}

TEST(Registry, TakesTheInstructionSetOfTheEnvironment) {
  for (const cpu::InstructionSet* set : cpu::available_instruction_sets()) {
    const ChosenIsa chosen{std::string(set->name)};
    const auto backend = make_backend("cpu", "auto", 1);
    EXPECT_EQ(backend->describe(), "cpu (" + std::string(set->name) + ", 1 thread)");
    EXPECT_EQ(backend->activation_dtype(), set->fast_bf16 ? DType::kBF16 : DType::kF32);
  }
  const ChosenIsa chosen("mmx");
  try {
    make_backend("cpu", "auto", 1);
    FAIL() << "expected an InvalidArgument";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("portable, got \"mmx\""), std::string::npos)
        << error.what();
  }
}

TEST(Registry, RefusesWhatItDoesNotHave) {
  EXPECT_THROW(make_backend("cuda", "auto", 0), BackendUnavailable);
  EXPECT_THROW(make_backend("cuda:1", "auto", 0), BackendUnavailable);
  EXPECT_THROW(make_backend("tpu", "auto", 0), InvalidArgument);
  EXPECT_THROW(make_backend("cpu", "float16", 0), Unsupported);
  EXPECT_THROW(make_backend("cpu", "int8", 0), InvalidArgument);
  EXPECT_THROW(make_backend("cpu", "auto", -1), InvalidArgument);
  EXPECT_THROW(make_backend("cpu", "auto", 100000), InvalidArgument);
}

TEST(Registry, ListsEveryBackend) {
  const std::vector<BackendInfo> infos = backends();
  ASSERT_EQ(infos.size(), 2U);
  EXPECT_TRUE(infos[0].name == "cpu" && infos[0].available);
  EXPECT_NE(infos[0].detail.find("portable"), std::string::npos);
  EXPECT_TRUE(infos[1].name == "cuda" && !infos[1].available && !infos[1].detail.empty());
}

}  // namespace
}  // namespace longspan
