#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace longspan {

using Json = nlohmann::json;

/// Parses untrusted text strictly: an object at the top, no duplicate keys, no deeper than 64
/// levels, valid UTF-8, numbers that fit. Throws CheckpointError that begins with `where`.
Json parse_json(std::string_view text, const std::string& where);

/// Reads a small text file. Throws CheckpointError when it is absent, not a regular file or larger
/// than max_bytes.
std::string read_text_file(const std::string& path, int64_t max_bytes);

/// Text of a file, cut for a message at 60 bytes or a little less.
std::string shortened(const std::string& text);

/// The value in a few words, for error messages: 12, "foo", an object, nothing.
std::string describe(const Json* value);

/// Typed access to a JSON object. Each getter throws CheckpointError such as
/// `config.json: hidden_size: expected an integer in [1, 262144], got "foo"`.
/// A key that holds null counts as absent.
class JsonObject {
 public:
  /// `where` names the file (and the path inside it); the object must outlive this view.
  /// Throws CheckpointError when value is not an object.
  JsonObject(const Json& value, std::string where);

  const std::string& where() const { return where_; }
  bool has(std::string_view key) const { return find(key) != nullptr; }
  bool has_key(std::string_view key) const { return value_.contains(key); }  ///< null or not
  const Json* find(std::string_view key) const;                              ///< null when absent

  int64_t integer(std::string_view key, int64_t min, int64_t max) const;
  int64_t integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const;
  /// Written as an integer or not; always finite.
  double number_or(std::string_view key, double fallback) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  std::string text_or(std::string_view key, std::string fallback) const;
  std::vector<int64_t> integers(std::string_view key, int64_t min, int64_t max) const;
  /// A list of strings. Empty when absent.
  std::vector<std::string> texts(std::string_view key) const;

  /// Throws CheckpointError: where: key: expected ..., got the value.
  [[noreturn]] void fail(std::string_view key, const std::string& expected) const;

 private:
  [[noreturn]] void fail_item(std::string_view key, const std::string& expected,
                              const Json& item) const;

  const Json& value_;
  std::string where_;
};

}  // namespace longspan
