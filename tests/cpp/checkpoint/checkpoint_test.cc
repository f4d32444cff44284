#include "checkpoint/checkpoint.h"

#include <sys/resource.h>
#include <unistd.h>

#include <vector>

#include "checkpoint/files.h"
#include "longspan/error.h"

namespace longspan {
namespace {

using test::expect_throw;
using test::safetensors;
using test::TempDir;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

/// One float32 tensor [rows, cols] that holds `value` everywhere.
std::string file_with(const std::string& name, int64_t rows, int64_t cols, float value) {
  std::string data;
  for (int64_t i = 0; i < rows * cols; ++i) data += test::bytes_of(value);
  std::string header = "{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[" + std::to_string(rows) +
                       "," + std::to_string(cols) + "],\"data_offsets\":[0," +
                       std::to_string(data.size()) + "]}}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return safetensors(header, data);
}

/// A directory with a config.json, which open() only looks for.
class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() { dir_.write("config.json", "{}"); }

  void expect_refused(const std::string& part) {
    expect_throw<CheckpointError>([this] { Checkpoint::open(dir_.path()); }, part);
  }

  const TempDir dir_;
};

TEST_F(CheckpointTest, SingleFile) {
  dir_.write(kSingle, file_with("w", 2, 3, 1.5F));
  const auto checkpoint = Checkpoint::open(dir_.path());
  EXPECT_TRUE(checkpoint->contains("w"));
  EXPECT_FALSE(checkpoint->contains("v"));
  EXPECT_EQ(checkpoint->names(), std::vector<std::string>{"w"});
  const WeightView view = checkpoint->tensor("w", 2, 3);
  EXPECT_EQ(view.dtype, DType::kF32);
  EXPECT_EQ(view.rows, 2);
  EXPECT_EQ(view.cols, 3);
  EXPECT_EQ(view.stride, 3);
  EXPECT_EQ(view.name, "w");
  EXPECT_EQ(static_cast<const float*>(view.row(1))[2], 1.5F);
}

TEST_F(CheckpointTest, Shards) {
  dir_.write("a.safetensors", file_with("x", 1, 2, 1.0F));
  dir_.write("b.safetensors", file_with("y", 1, 2, 2.0F));
  dir_.write(
      kIndex,
      R"({"metadata":{"total_size":1},"weight_map":{"y":"b.safetensors","x":"a.safetensors"}})");
  const auto checkpoint = Checkpoint::open(dir_.path());
  EXPECT_EQ(checkpoint->names(), (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(*static_cast<const float*>(checkpoint->tensor("x", 1, 2).data), 1.0F);
  EXPECT_EQ(*static_cast<const float*>(checkpoint->tensor("y", 1, 2).data), 2.0F);
}

TEST_F(CheckpointTest, RefusesATensorThatIsNotAsAsked) {
  dir_.write(kSingle, file_with("w", 2, 3, 0.0F));
  const auto checkpoint = Checkpoint::open(dir_.path());
  const auto refuse = [&](const std::string& name, int64_t rows, int64_t cols,
                          const std::string& part) {
    expect_throw<CheckpointError>([&] { checkpoint->tensor(name, rows, cols); }, part);
  };
  refuse("v", 2, 3, "expected a tensor v, got none");
  refuse("w", 3, 2, "w: expected shape [3, 2], got [2, 3]");
  refuse("w", 1, 6, "w: expected shape [6], got [2, 3]");
  refuse("w", 2, 4, "w: expected shape [2, 4], got [2, 3]");
}

TEST_F(CheckpointTest, AVectorIsOneRow) {
  dir_.write(kSingle, safetensors(R"({"n":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}} )",
                                  std::string(8, '\0')));
  const WeightView view = Checkpoint::open(dir_.path())->tensor("n", 1, 4);
  EXPECT_EQ(view.rows, 1);
  EXPECT_EQ(view.cols, 4);
  EXPECT_EQ(view.dtype, DType::kBF16);
}

TEST_F(CheckpointTest, RefusesOtherDtypesAndMisalignedData) {
  dir_.write(kSingle, safetensors(R"({"n":{"dtype":"I16","shape":[4],"data_offsets":[0,8]}})",
                                  std::string(8, '\0')));
  expect_throw<CheckpointError>([&] { Checkpoint::open(dir_.path())->tensor("n", 1, 4); },
                                "n: expected dtype F32, F16 or BF16, got I16");
  std::string header = R"({"n":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  header.resize((header.size() + 7) / 8 * 8 + 2, ' ');
  dir_.write(kSingle, safetensors(header, std::string(8, '\0')));
  expect_throw<CheckpointError>([&] { Checkpoint::open(dir_.path())->tensor("n", 1, 2); },
                                "n: expected data aligned to 4 bytes");
}

TEST_F(CheckpointTest, RefusesHostileIndexes) {
  dir_.write("a.safetensors", file_with("x", 1, 2, 1.0F));
  const auto refuse = [&](const std::string& index, const std::string& part) {
    SCOPED_TRACE(index);
    dir_.write(kIndex, index);
    expect_refused(part);
  };
  refuse("", "expected valid JSON");
  refuse("[]", "expected an object, got a list of 0");
  refuse("{}", "weight_map: expected an object, got nothing");
  refuse(R"({"weight_map":["a.safetensors"]})", "weight_map: expected an object");
  for (const char* name : {"\"../a.safetensors\"", "\"/a.safetensors\"", "\"x/a.safetensors\"",
                           "\"..\"", "\".\"", "\"\"", "\"..\\\\a.safetensors\"",
                           "\"a\\u0000.safetensors\"", "\"config.json\"", "3", "null", "{}"}) {
    refuse(std::string(R"({"weight_map":{"x":)") + name + "}}",
           "weight_map: x: expected the name of a .safetensors file in the same directory");
  }
  refuse(R"({"weight_map":{"x":"b.safetensors"}})", "b.safetensors: expected a readable file");
  refuse(R"({"weight_map":{"y":"a.safetensors"}})",
         "a.safetensors: expected tensor \"y\", as model.safetensors.index.json says, got none");
  refuse(R"({"weight_map":{"x":"a.safetensors","x":"a.safetensors"}})", "\"x\" twice");
}

TEST_F(CheckpointTest, SaysWhatIsMissing) {
  expect_refused("expected model.safetensors or model.safetensors.index.json, got neither");
  dir_.write("pytorch_model.bin", "x");
  expect_refused("got pytorch_model.bin; longspan.pipeline reads it with use_safetensors=False");
  dir_.write("m.gguf", "x");
  expect_refused("got m.gguf; give longspan.pipeline the path of that file");
  expect_throw<CheckpointError>([&] { Checkpoint::open(dir_.path() + "/absent"); },
                                "expected a directory with config.json and safetensors weights, "
                                "got nothing");
  expect_throw<CheckpointError>([&] { Checkpoint::open(dir_.path() + "/m.gguf"); }, "got a file");
  const TempDir empty;
  expect_throw<CheckpointError>([&] { Checkpoint::open(empty.path()); },
                                "got one without config.json");
}

TEST_F(CheckpointTest, ReleaseGivesBackWholePagesAndLosesNothing) {
  const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  const int64_t cols = 16 * page / 4;
  dir_.write(kSingle, file_with("w", 1, cols, 3.0F));
  const auto checkpoint = Checkpoint::open(dir_.path());
  const WeightView view = checkpoint->tensor("w", 1, cols);
  const auto sum = [&] {
    double total = 0;
    for (int64_t i = 0; i < cols; ++i) total += static_cast<const float*>(view.data)[i];
    return total;
  };
  const auto page_faults = [] {
    rusage usage{};
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_minflt + usage.ru_majflt;
  };
  EXPECT_EQ(sum(), 3.0 * static_cast<double>(cols));
  checkpoint->release(view);
  const int64_t before = page_faults();
  EXPECT_EQ(sum(), 3.0 * static_cast<double>(cols));
  EXPECT_GT(page_faults(), before);
}

}  // namespace
}  // namespace longspan
