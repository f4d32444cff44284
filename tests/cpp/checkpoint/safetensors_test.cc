#include "checkpoint/safetensors.h"

#include "checkpoint/files.h"
#include "longspan/error.h"

namespace longspan {
namespace {

using test::safetensors;
using test::TempDir;

const std::string kData24(24, '\x11');

/// A header entry.
std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

std::string object(const std::string& members) { return "{" + members + "}"; }

TEST(Safetensors, ReadsEveryTensorWhereItIs) {
  const TempDir dir;
  std::string data;
  for (char i = 0; i < 23; ++i) data += i;
  const std::string header = object(
      "\"__metadata__\":{\"format\":\"pt\"}," + tensor("b", "F32", "[2,2]", "[0,16]") + "," +
      tensor("a", "BF16", "[3]", "[16,22]") + "," + tensor("none", "F16", "[0,7]", "[22,22]") +
      "," + tensor("scalar", "U8", "[]", "[22,23]"));
  const SafetensorsFile file(dir.write("x.safetensors", safetensors(header + "   ", data)));
  ASSERT_EQ(file.tensors().size(), 4U);
  const auto check = [&](const std::string& name, const std::string& dtype,
                         const std::vector<int64_t>& shape, size_t begin, size_t end) {
    const SafetensorsEntry& entry = file.tensors().at(name);
    EXPECT_EQ(entry.dtype, dtype);
    EXPECT_EQ(entry.shape, shape);
    EXPECT_EQ(
        std::string(reinterpret_cast<const char*>(entry.data), static_cast<size_t>(entry.bytes)),
        data.substr(begin, end - begin));
  };
  check("b", "F32", {2, 2}, 0, 16);
  check("a", "BF16", {3}, 16, 22);
  check("none", "F16", {0, 7}, 22, 22);
  check("scalar", "U8", {}, 22, 23);
}

TEST(Safetensors, AcceptsAFileWithoutTensors) {
  const TempDir dir;
  EXPECT_TRUE(SafetensorsFile(dir.write("x", safetensors("{}", ""))).tensors().empty());
}

struct Hostile {
  const char* what;
  std::string bytes;
  std::string message;  ///< part of the error's text
};

std::vector<Hostile> hostile_files() {
  const auto with_size = [](uint64_t size, const std::string& rest) {
    return test::bytes_of(size) + rest;
  };
  const auto file = [](const std::string& members) {
    return safetensors(object(members), kData24);
  };
  const std::string good = tensor("t", "F32", "[6]", "[0,24]");
  const std::string deep = std::string(200, '[') + std::string(200, ']');
  const std::string max = "9223372036854775807";
  return {
      {"empty file", "", "truncated: expected at least 8 bytes, got 0"},
      {"half a length", "\x10\0\0", "truncated: expected at least 8 bytes"},
      {"length past the end", with_size(100, "{}"),
       "truncated: expected at least 108 bytes, got 10"},
      {"length of 100 MB and more", with_size(100'000'001, "{}"), "header: expected at most"},
      {"length near 2^64", with_size(UINT64_MAX, "{}"), "header: expected at most"},
      {"length that wraps with the prefix", with_size(UINT64_MAX - 7, "{}"), "header: expected"},
      {"length at 2^63", with_size(uint64_t{1} << 63, "{}"), "header: expected at most"},
      {"empty header", safetensors("", kData24), "begin with {"},
      {"leading space", safetensors(" {}", ""), "begin with {"},
      {"a list", safetensors("[1]", ""), "begin with {"},
      {"cut JSON", safetensors("{\"t\":", ""), "expected valid JSON"},
      {"two values", safetensors("{}{}", ""), "expected valid JSON"},
      {"comment", safetensors("{/**/}", ""), "expected valid JSON"},
      {"not UTF-8", safetensors("{\"\xFF\":1}", ""), "expected valid JSON"},
      {"number too large", file("\"t\":1e999"), "expected valid JSON"},
      {"nesting", file("\"t\":" + deep), "expected at most 64 levels"},
      {"duplicate tensor", file(good + "," + good), "expected each key once, got \"t\" twice"},
      {"duplicate field", file("\"t\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}"), "\"dtype\" twice"},
      {"entry not an object", file("\"t\":[1]"), "\"t\": expected an object, got a list of 1"},
      {"metadata not an object", file("\"__metadata__\":3," + good), "expected an object, got 3"},
      {"metadata not strings", file("\"__metadata__\":{\"k\":1}," + good), "k: expected a string"},
      {"no dtype", file("\"t\":{\"shape\":[6],\"data_offsets\":[0,24]}"), "dtype: expected"},
      {"unknown dtype", file(tensor("t", "F31", "[6]", "[0,24]")), "dtype: expected"},
      {"dtype a number", file("\"t\":{\"dtype\":32,\"shape\":[6],\"data_offsets\":[0,24]}"),
       "dtype: expected a string, got 32"},
      {"no shape", file("\"t\":{\"dtype\":\"F32\",\"data_offsets\":[0,24]}"), "shape: expected"},
      {"shape a number", file(tensor("t", "F32", "6", "[0,24]")), "shape: expected a list"},
      {"negative size", file(tensor("t", "F32", "[-6]", "[0,24]")), "shape: expected"},
      {"two negative sizes", file(tensor("t", "F32", "[-2,-3]", "[0,24]")), "shape: expected"},
      {"fractional size", file(tensor("t", "F32", "[6.0]", "[0,24]")), "shape: expected"},
      {"size past int64", file(tensor("t", "F32", "[18446744073709551615]", "[0,24]")),
       "shape: expected"},
      {"product wraps to 24 bytes", file(tensor("t", "F32", "[4611686018427387910]", "[0,24]")),
       "fewer than 2^63"},
      {"product overflows", file(tensor("t", "U8", "[" + max + "," + max + "]", "[0,24]")),
       "fewer than 2^63"},
      {"part of a byte", file(tensor("t", "F4", "[3]", "[0,24]")), "whole number of bytes"},
      {"no offsets", file("\"t\":{\"dtype\":\"F32\",\"shape\":[6]}"), "data_offsets: expected"},
      {"one offset", file(tensor("t", "F32", "[6]", "[24]")), "data_offsets: expected"},
      {"three offsets", file(tensor("t", "F32", "[6]", "[0,24,24]")), "data_offsets: expected"},
      {"offsets reversed", file(tensor("t", "F32", "[6]", "[24,0]")), "begin <= end"},
      {"negative offset", file(tensor("t", "F32", "[6]", "[-24,0]")), "data_offsets: expected"},
      {"offset past the end", file(tensor("t", "F32", "[7]", "[0,28]")),
       "truncated: expected data up to byte 28, got 24"},
      {"offset near 2^63", file(tensor("t", "F32", "[0]", "[" + max + "," + max + "]")),
       "truncated"},
      {"more bytes than the shape", file(tensor("t", "F32", "[5]", "[0,24]")),
       "expected 20 bytes (dtype, shape), got 24"},
      {"overlap",
       file(tensor("a", "F32", "[6]", "[0,24]") + "," + tensor("b", "F32", "[3]", "[12,24]")),
       "\"b\": data_offsets: expected it to begin where the one before it ends, at 24, got 12"},
      {"the same bytes twice", file(good + "," + tensor("u", "F32", "[6]", "[0,24]")),
       "begin where the one before it ends"},
      {"hole at the start", file(tensor("t", "F32", "[5]", "[4,24]")), "at 0, got 4"},
      {"hole inside",
       file(tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[3]", "[12,24]")),
       "at 8, got 12"},
      {"bytes left over", file(tensor("t", "F32", "[5]", "[0,20]")), "fill 24 bytes, got 20"},
      {"Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
       "git lfs pull"},
  };
}

TEST(Safetensors, RefusesHostileFiles) {
  for (const Hostile& hostile : hostile_files()) {
    SCOPED_TRACE(hostile.what);
    const TempDir dir;
    const std::string path = dir.write("x.safetensors", hostile.bytes);
    test::expect_throw<CheckpointError>([&] { SafetensorsFile file(path); }, hostile.message);
    test::expect_throw<CheckpointError>([&] { SafetensorsFile file(path); }, "x.safetensors: ");
  }
}

TEST(Safetensors, RefusesEveryTruncation) {
  const TempDir dir;
  const std::string whole = safetensors(object(tensor("t", "F32", "[6]", "[0,24]")), kData24);
  SafetensorsFile(dir.write("x", whole));
  for (size_t size = 0; size < whole.size(); ++size) {
    SCOPED_TRACE(size);
    const std::string path = dir.write("x", whole.substr(0, size));
    test::expect_throw<CheckpointError>([&] { SafetensorsFile file(path); }, "truncated");
  }
}

TEST(Safetensors, RefusesWhatIsNoRegularFile) {
  const TempDir dir;
  test::expect_throw<CheckpointError>([&] { SafetensorsFile file(dir.path() + "/absent"); },
                                      "expected a readable file");
  test::expect_throw<CheckpointError>([&] { SafetensorsFile file(dir.path()); },
                                      "expected a regular file");
}

}  // namespace
}  // namespace longspan
