#include "checkpoint/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>

#include "checkpoint/json.h"
#include "core/check.h"

namespace longspan {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are used as they are stored");

constexpr int64_t kPrefixBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the reference reader's limit
constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();

/// Bits per element; 0: not a dtype of the format.
int64_t bits_of(std::string_view dtype) {
  struct Row {
    std::string_view name;
    int64_t bits;
  };
  static constexpr Row kTable[] = {
      {"BF16", 16},   {"F16", 16},    {"F32", 32},    {"F64", 64},    {"BOOL", 8},
      {"U8", 8},      {"I8", 8},      {"U16", 16},    {"I16", 16},    {"U32", 32},
      {"I32", 32},    {"U64", 64},    {"I64", 64},    {"C64", 64},    {"F8_E4M3", 8},
      {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},
  };
  for (const Row& row : kTable) {
    if (row.name == dtype) return row.bits;
  }
  return 0;
}

/// The JSON text of the header.
std::string_view header_text(const MappedFile& file, const std::string& path) {
  constexpr std::string_view kLfsPointer = "version https://git-lfs";
  const std::string_view all(reinterpret_cast<const char*>(file.data()),
                             static_cast<size_t>(file.size()));
  require<CheckpointError>(!all.starts_with(kLfsPointer), path,
                           ": expected safetensors, got a Git LFS pointer; run git lfs pull");
  require<CheckpointError>(file.size() >= kPrefixBytes, path, ": truncated: expected at least ",
                           kPrefixBytes, " bytes, got ", file.size());
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  require<CheckpointError>(header_bytes <= static_cast<uint64_t>(kMaxHeaderBytes), path,
                           ": header: expected at most ", kMaxHeaderBytes, " bytes, got ",
                           header_bytes);
  const int64_t data_begin = kPrefixBytes + static_cast<int64_t>(header_bytes);
  require<CheckpointError>(file.size() >= data_begin, path, ": truncated: expected at least ",
                           data_begin, " bytes, got ", file.size());
  const std::string_view text = all.substr(kPrefixBytes, header_bytes);
  require<CheckpointError>(text.starts_with('{'), path, ": header: expected it to begin with {");
  return text;
}

/// Bytes of a tensor; fails on overflow.
int64_t size_in_bytes(const JsonObject& tensor, const std::vector<int64_t>& shape, int64_t bits) {
  int64_t total = bits;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(total, size, &total)) {
      tensor.fail("shape", "fewer than 2^63 bits");
    }
  }
  if (total % 8 != 0) tensor.fail("shape", "a whole number of bytes");
  return total / 8;
}

/// Checks that the tensors cover the data exactly, one after the other.
void check_cover(const std::map<std::string, SafetensorsEntry>& tensors, const std::byte* data,
                 int64_t data_bytes, const std::string& path) {
  struct Range {
    int64_t begin;
    int64_t bytes;
    const std::string* name;
  };
  std::vector<Range> ranges;
  ranges.reserve(tensors.size());
  for (const auto& [name, entry] : tensors) {
    ranges.push_back({entry.data - data, entry.bytes, &name});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.bytes < b.bytes;
  });
  int64_t end = 0;
  for (const Range& range : ranges) {
    require<CheckpointError>(
        range.begin == end, path, ": tensor \"", shortened(*range.name),
        "\": data_offsets: expected it to begin where the one before it ends, ", "at ", end,
        ", got ", range.begin);
    end += range.bytes;
  }
  require<CheckpointError>(end == data_bytes, path, ": expected the tensors to fill ", data_bytes,
                           " bytes, got ", end);
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), file_(path) {
  const std::string_view text = header_text(file_, path);
  const Json header = parse_json(text, path + ": header");
  const int64_t data_begin = kPrefixBytes + static_cast<int64_t>(text.size());
  const int64_t data_bytes = file_.size() - data_begin;
  const std::byte* data = file_.data() + data_begin;
  for (const auto& [name, json] : header.items()) {
    const JsonObject tensor(json, path + ": tensor \"" + shortened(name) + "\"");
    if (name == "__metadata__") {
      for (const auto& [key, value] : json.items()) {
        if (!value.is_string()) tensor.fail(shortened(key), "a string");
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    SafetensorsEntry entry;
    entry.dtype = tensor.text_or("dtype", "");
    const int64_t bits = bits_of(entry.dtype);
    if (bits == 0) tensor.fail("dtype", "a safetensors dtype such as F32, F16 or BF16");
    entry.shape = tensor.integers("shape", 0, kMaxInt);
    entry.bytes = size_in_bytes(tensor, entry.shape, bits);
    const std::vector<int64_t> offsets = tensor.integers("data_offsets", 0, kMaxInt);
    if (offsets.size() != 2 || offsets[0] > offsets[1]) {
      tensor.fail("data_offsets", "[begin, end] with begin <= end");
    }
    require<CheckpointError>(offsets[1] <= data_bytes, tensor.where(), ": truncated: expected ",
                             "data up to byte ", offsets[1], ", got ", data_bytes);
    require<CheckpointError>(offsets[1] - offsets[0] == entry.bytes, tensor.where(),
                             ": data_offsets: expected ", entry.bytes,
                             " bytes (dtype, shape), got ", offsets[1] - offsets[0]);
    entry.data = data + offsets[0];
    tensors_.emplace(name, std::move(entry));
  }
  check_cover(tensors_, data, data_bytes, path);
}

}  // namespace longspan
