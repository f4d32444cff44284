#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/kv_rows.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/safetensors_writer.h"
#include "longspan/context.h"

namespace longspan {

/// What a context file holds beside keys and values.
struct ContextFacts {
  std::string model;  ///< fingerprint()
  std::vector<int32_t> token_ids;
  RopeProfile profile;  ///< as read: inv_freq, attention_factor, length and logn_length alone
};

// A context file is safetensors. Keys and values are [layers, kv_heads, tokens, head_dim]: native
// elements (F32, BF16), I8 (int6 too) or F8_E4M3, or U8 with two int4 codes a byte; their scales
// are BF16 [layers, kv_heads, tokens], of int4 [layers, kv_heads, tokens, groups, 2]: scale and
// zero (backend/kv_rows.h). token_ids is I32 [tokens], rope.inv_freq F64 [pairs]; the rest is
// metadata. It knows of no blocks: it can be read into blocks of any length.

/// Writes one, some tokens at a time.
class ContextWriter {
 public:
  /// rows: of all tokens. Throws CheckpointError.
  ContextWriter(const std::string& path, const ContextFacts& facts, const KvRows& rows);

  /// The rows of tokens [first, first + rows.tokens()).
  void write(int64_t first, const KvRows& rows, std::span<const std::byte> data);
  /// See SafetensorsWriter.
  void finish() { writer_.finish(); }
  int64_t bytes() const { return writer_.bytes(); }

 private:
  const KvRows all_;
  SafetensorsWriter writer_;
};

/// Reads one, of which nothing is trusted.
class ContextFile {
 public:
  /// shape: what the model caches of a token: layers, KV heads and head_dim. Throws CheckpointError
  /// naming the file, the field and what is wrong with it.
  ContextFile(const std::string& path, const KvShape& shape);

  const ContextFacts& facts() const { return facts_; }
  int64_t bytes() const { return file_.bytes(); }
  /// The order in which read() gives so many tokens.
  KvRows rows(int64_t tokens) const { return {all_->shape(), all_->dtype(), tokens}; }

  /// Rows of tokens [first, first + rows.tokens()). Throws CheckpointError where they are not
  /// finite.
  void read(int64_t first, const KvRows& rows, std::span<std::byte> data) const;

 private:
  std::string metadata(const std::string& key) const;
  int64_t metadata_integer(const std::string& key, int64_t min) const;
  const SafetensorsEntry& tensor(const std::string& name) const;
  void check_tensors() const;

  const SafetensorsFile file_;
  ContextFacts facts_;
  std::unique_ptr<const KvRows> all_;
};

}  // namespace longspan
