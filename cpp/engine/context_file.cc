#include "engine/context_file.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <string_view>

#include "core/check.h"

namespace longspan {
namespace {

constexpr std::string_view kFormat = "longspan context 3";
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
/// Longer than any context: a profile of it is still numbers.
constexpr int64_t kMaxLength = int64_t{1} << 40;

constexpr const char* kTokenIds = "token_ids";
constexpr const char* kInvFreq = "rope.inv_freq";

/// The file's tensors of keys and values, in the order of KvPart.
constexpr std::array<const char*, kKvParts.size()> kPartNames = {"keys", "values", "key_scales",
                                                                 "value_scales"};
/// The order of tensors in the file: wider elements first.
constexpr std::array<KvPart, kKvParts.size()> kFileOrder = {
    KvPart::kKeyParameters, KvPart::kValueParameters, KvPart::kKeys, KvPart::kValues};

const char* name_of(KvPart part) { return kPartNames[static_cast<size_t>(part)]; }

KvElement element_of(const KvRows& rows, KvPart part) {
  const bool keys = part == KvPart::kKeys || part == KvPart::kKeyParameters;
  return keys ? key_element(rows.shape().format) : value_element(rows.shape().format);
}

const char* dtype_of(const KvRows& rows, KvPart part) {
  if (part == KvPart::kKeyParameters || part == KvPart::kValueParameters) return "BF16";
  switch (element_of(rows, part)) {
    case KvElement::kNative:
      return rows.dtype() == DType::kF32 ? "F32" : "BF16";
    case KvElement::kInt8:
    case KvElement::kInt6:
      return "I8";
    case KvElement::kFp8:
      return "F8_E4M3";
    default:
      return "U8";
  }
}

std::vector<int64_t> shape_of(const KvRows& rows, KvPart part) {
  const KvShape& s = rows.shape();
  std::vector<int64_t> shape = {s.num_layers, s.num_kv_heads, rows.tokens()};
  const bool int4 = element_of(rows, part) == KvElement::kInt4;
  if (part == KvPart::kKeys || part == KvPart::kValues) {
    shape.push_back(int4 ? s.head_dim / 2 : s.head_dim);
  } else if (int4) {
    shape.insert(shape.end(), {int4_groups(s.head_dim), 2});
  }
  return shape;
}

/// All tensors of a file; those of parts that the format does not have are left out.
std::vector<SafetensorsSpec> specs_of(const ContextFacts& facts, const KvRows& rows) {
  const auto pairs = std::ssize(facts.profile.inv_freq);
  const auto tokens = std::ssize(facts.token_ids);
  std::vector<SafetensorsSpec> specs = {{kInvFreq, "F64", {pairs}, pairs * 8},
                                        {kTokenIds, "I32", {tokens}, tokens * 4}};
  const KvShape& s = rows.shape();
  for (const KvPart part : kFileOrder) {
    if (rows.row_bytes(part) == 0) continue;
    specs.push_back({name_of(part), dtype_of(rows, part), shape_of(rows, part),
                     s.num_layers * s.num_kv_heads * rows.head_bytes(part)});
  }
  return specs;
}

/// The shortest text that reads back as the same number.
std::string text_of(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

std::map<std::string, std::string> metadata_of(const ContextFacts& facts, const KvRows& rows) {
  return {{"format", std::string(kFormat)},
          {"longspan", LONGSPAN_VERSION},
          {"model", facts.model},
          {"kv_cache_dtype", std::string(name_of(rows.shape().format))},
          {"rope.type", facts.profile.type},
          {"rope.length", std::to_string(facts.profile.length)},
          {"rope.attention_factor", text_of(facts.profile.attention_factor)},
          {"rope.logn_length", std::to_string(facts.profile.logn_length)}};
}

/// The values of a tensor of one dimension, which need not be aligned.
template <class T>
std::vector<T> values_of(const SafetensorsEntry& entry) {
  std::vector<T> values(static_cast<size_t>(entry.bytes) / sizeof(T));
  std::memcpy(values.data(), entry.data, values.size() * sizeof(T));
  return values;
}

}  // namespace

ContextWriter::ContextWriter(const std::string& path, const ContextFacts& facts, const KvRows& rows)
    : all_(rows), writer_(path, specs_of(facts, rows), metadata_of(facts, rows)) {
  writer_.write(0, 0, std::as_bytes(std::span(facts.profile.inv_freq)));
  writer_.write(1, 0, std::as_bytes(std::span(facts.token_ids)));
}

void ContextWriter::write(int64_t first, const KvRows& rows, std::span<const std::byte> data) {
  const KvShape& s = rows.shape();
  size_t index = 2;
  for (const KvPart part : kFileOrder) {
    if (rows.row_bytes(part) == 0) continue;
    for (int64_t layer = 0; layer < s.num_layers; ++layer) {
      for (int64_t head = 0; head < s.num_kv_heads; ++head) {
        const int64_t before =
            (layer * s.num_kv_heads + head) * all_.tokens() + first;  // rows of the tensor
        writer_.write(index, before * rows.row_bytes(part),
                      {rows.head(data.data(), part, layer, head),
                       static_cast<size_t>(rows.head_bytes(part))});
      }
    }
    ++index;
  }
}

ContextFile::ContextFile(const std::string& path, const KvShape& shape) : file_(path) {
  const std::string format = metadata("format");
  require<CheckpointError>(format == kFormat, path, ": format: expected \"", kFormat, "\", got \"",
                           format, "\"");
  facts_.model = metadata("model");
  facts_.profile.length = metadata_integer("rope.length", 1);
  facts_.profile.logn_length = metadata_integer("rope.logn_length", 0);
  const std::string factor = metadata("rope.attention_factor");
  double& value = facts_.profile.attention_factor;
  const auto read = std::from_chars(factor.data(), factor.data() + factor.size(), value);
  require<CheckpointError>(
      read.ec == std::errc{} && read.ptr == factor.data() + factor.size() && std::isfinite(value),
      path, ": rope.attention_factor: expected a number, got \"", factor, "\"");
  const std::string name = metadata("kv_cache_dtype");
  const auto* found = std::ranges::find(kKvFormatNames, name);
  require<CheckpointError>(found != kKvFormatNames.end(), path,
                           ": kv_cache_dtype: expected one that kv_cache_dtype can be, got \"",
                           name, "\"");
  KvShape own = shape;
  own.format = static_cast<KvFormat>(found - kKvFormatNames.begin());

  const SafetensorsEntry& ids = tensor(kTokenIds);
  const int64_t tokens = ids.shape.empty() ? 0 : ids.shape.front();
  require<CheckpointError>(
      ids.dtype == "I32" && ids.shape.size() == 1 && tokens > 0 && tokens <= kMaxTokens, path,
      ": tensor \"", kTokenIds, "\": expected I32 [tokens], got ", ids.dtype, " ",
      text_of(ids.shape));
  facts_.token_ids = values_of<int32_t>(ids);
  const SafetensorsEntry& inv_freq = tensor(kInvFreq);
  require<CheckpointError>(inv_freq.dtype == "F64" && inv_freq.shape.size() == 1, path,
                           ": tensor \"", kInvFreq, "\": expected F64 [pairs], got ",
                           inv_freq.dtype, " ", text_of(inv_freq.shape));
  facts_.profile.inv_freq = values_of<double>(inv_freq);

  const bool float32 = tensor("keys").dtype == "F32";
  all_ = std::make_unique<KvRows>(own, float32 ? DType::kF32 : DType::kBF16, tokens);
  check_tensors();
}

std::string ContextFile::metadata(const std::string& key) const {
  const auto found = file_.metadata().find(key);
  require<CheckpointError>(found != file_.metadata().end(), file_.path(), ": ", key,
                           ": expected the metadata of a saved context, got none");
  return found->second.substr(0, 100);  // of a message at most so much is anyone's
}

int64_t ContextFile::metadata_integer(const std::string& key, int64_t min) const {
  const std::string text = metadata(key);
  int64_t value = 0;
  const auto read = std::from_chars(text.data(), text.data() + text.size(), value);
  require<CheckpointError>(read.ec == std::errc{} && read.ptr == text.data() + text.size() &&
                               value >= min && value <= kMaxLength,
                           file_.path(), ": ", key, ": expected an integer in [", min, ", ",
                           kMaxLength, "], got \"", text, "\"");
  return value;
}

const SafetensorsEntry& ContextFile::tensor(const std::string& name) const {
  const auto found = file_.tensors().find(name);
  require<CheckpointError>(found != file_.tensors().end(), file_.path(), ": expected a tensor \"",
                           name, "\", got none");
  return found->second;
}

void ContextFile::check_tensors() const {
  const std::vector<SafetensorsSpec> specs = specs_of(facts_, *all_);
  for (const SafetensorsSpec& spec : specs) {
    const SafetensorsEntry& entry = tensor(spec.name);
    require<CheckpointError>(entry.dtype == spec.dtype && entry.shape == spec.shape, file_.path(),
                             ": tensor \"", spec.name, "\": expected ", spec.dtype, " ",
                             text_of(spec.shape), ", got ", entry.dtype, " ", text_of(entry.shape));
  }
  require<CheckpointError>(file_.tensors().size() == specs.size(), file_.path(), ": expected ",
                           specs.size(), " tensors, got ", file_.tensors().size());
}

void ContextFile::read(int64_t first, const KvRows& rows, std::span<std::byte> data) const {
  const KvShape& s = rows.shape();
  for (const KvPart part : kKvParts) {
    if (rows.row_bytes(part) == 0) continue;
    const std::byte* from = tensor(name_of(part)).data;
    for (int64_t layer = 0; layer < s.num_layers; ++layer) {
      for (int64_t head = 0; head < s.num_kv_heads; ++head) {
        const int64_t before = (layer * s.num_kv_heads + head) * all_->tokens() + first;
        std::copy_n(from + before * rows.row_bytes(part), rows.head_bytes(part),
                    rows.head(data.data(), part, layer, head));
      }
    }
  }
  require<CheckpointError>(is_finite(rows, data), file_.path(), ": tokens ", first, " to ",
                           first + rows.tokens() - 1,
                           ": expected finite keys and values, got NaN or infinity");
}

}  // namespace longspan
