#include "checkpoint/json.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

#include "core/check.h"

namespace longspan {
namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kMaxQuoted = 60;  // bytes of a file's text repeated in a message

/// A parser's complaint; it repeats the text, which need not be UTF-8.
std::string plain(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) >= 0x80U) c = '?';
  }
  return text.substr(0, 200);
}

}  // namespace

std::string shortened(const std::string& text) {
  if (text.size() <= kMaxQuoted) return text;
  size_t end = kMaxQuoted;  // moved to a character's first byte, so that messages stay UTF-8
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) --end;
  return text.substr(0, end) + "...";
}

Json parse_json(std::string_view text, const std::string& where) {
  std::vector<std::set<std::string>> keys;  // of the objects now open, outermost first
  const auto check = [&](int depth, Json::parse_event_t event, Json& value) {
    require<CheckpointError>(depth < kMaxDepth, where, ": expected at most ", kMaxDepth,
                             " levels of nesting, got more");
    if (event == Json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == Json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      require<CheckpointError>(keys.back().insert(key).second, where, ": expected each key once, ",
                               "got \"", shortened(key), "\" twice");
    }
    return true;
  };
  Json json;
  try {
    json = Json::parse(text.begin(), text.end(), check);
  } catch (const Json::exception& error) {
    throw CheckpointError(message(where, ": expected valid JSON, got ", plain(error.what())));
  }
  require<CheckpointError>(json.is_object(), where, ": expected an object, got ", describe(&json));
  return json;
}

std::string read_text_file(const std::string& path, int64_t max_bytes) {
  std::error_code error;
  require<CheckpointError>(std::filesystem::is_regular_file(path, error), path,
                           ": expected a file, got ",
                           std::filesystem::exists(path, error) ? "something else" : "nothing");
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = in ? static_cast<std::streamoff>(in.tellg()) : -1;
  require<CheckpointError>(size >= 0, path, ": expected a readable file");
  require<CheckpointError>(size <= max_bytes, path, ": expected at most ", max_bytes,
                           " bytes, got ", size);
  std::string text(static_cast<size_t>(size), '\0');
  in.seekg(0).read(text.data(), size);
  require<CheckpointError>(in.gcount() == size, path, ": truncated: expected ", size,
                           " bytes, got ", in.gcount());
  return text;
}

std::string describe(const Json* value) {
  if (value == nullptr) return "nothing";
  if (value->is_object()) return "an object";
  if (value->is_array()) return message("a list of ", value->size());
  if (value->is_string()) {
    return message('"', shortened(value->get_ref<const std::string&>()), '"');
  }
  return value->dump();
}

JsonObject::JsonObject(const Json& value, std::string where)
    : value_(value), where_(std::move(where)) {
  require<CheckpointError>(value.is_object(), where_, ": expected an object, got ",
                           describe(&value));
}

const Json* JsonObject::find(std::string_view key) const {
  const auto found = value_.find(key);
  return found == value_.end() || found->is_null() ? nullptr : &*found;
}

void JsonObject::fail(std::string_view key, const std::string& expected) const {
  throw CheckpointError(
      message(where_, ": ", key, ": expected ", expected, ", got ", describe(find(key))));
}

void JsonObject::fail_item(std::string_view key, const std::string& expected,
                           const Json& item) const {
  throw CheckpointError(
      message(where_, ": ", key, ": expected ", expected, ", got one with ", describe(&item)));
}

namespace {

/// True, with the value in `out`, for an integer of JSON in [min, max].
bool integer_in(const Json& value, int64_t min, int64_t max, int64_t& out) {
  if (!value.is_number_integer()) return false;
  if (value.is_number_unsigned() && !std::in_range<int64_t>(value.get<uint64_t>())) return false;
  out = value.get<int64_t>();
  return out >= min && out <= max;
}

}  // namespace

int64_t JsonObject::integer(std::string_view key, int64_t min, int64_t max) const {
  const Json* value = find(key);
  int64_t out = 0;
  if (value == nullptr || !integer_in(*value, min, max, out)) {
    fail(key, message("an integer in [", min, ", ", max, "]"));
  }
  return out;
}

int64_t JsonObject::integer_or(std::string_view key, int64_t fallback, int64_t min,
                               int64_t max) const {
  return has(key) ? integer(key, min, max) : fallback;
}

double JsonObject::number_or(std::string_view key, double fallback) const {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_number()) fail(key, "a number");
  return value->get<double>();
}

bool JsonObject::boolean_or(std::string_view key, bool fallback) const {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) fail(key, "true or false");
  return value->get<bool>();
}

std::string JsonObject::text_or(std::string_view key, std::string fallback) const {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_string()) fail(key, "a string");
  return value->get<std::string>();
}

std::vector<int64_t> JsonObject::integers(std::string_view key, int64_t min, int64_t max) const {
  const std::string expected = message("a list of integers in [", min, ", ", max, "]");
  const Json* value = find(key);
  if (value == nullptr || !value->is_array()) fail(key, expected);
  std::vector<int64_t> out(value->size());
  for (size_t i = 0; i < out.size(); ++i) {
    const Json& item = (*value)[i];
    if (!integer_in(item, min, max, out[i])) fail_item(key, expected, item);
  }
  return out;
}

std::vector<std::string> JsonObject::texts(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) fail(key, "a list of strings");
  std::vector<std::string> out;
  for (const Json& item : *value) {
    if (!item.is_string()) fail_item(key, "a list of strings", item);
    out.push_back(item.get<std::string>());
  }
  return out;
}

}  // namespace longspan
