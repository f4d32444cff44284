#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kv/block_pool.h"

namespace longspan {

/// The blocks of one sequence, in order of position: token p is in blocks()[p / block_len].
/// Its worst case is promised when it is made, so grow_to never fails. Returns everything to the
/// pool, which must outlive it, when destroyed.
class BlockTable {
 public:
  /// A table that begins with `shared`, kept blocks of the pool, and can grow to max_tokens;
  /// nullopt when the pool cannot promise that now.
  static std::optional<BlockTable> reserve(BlockPool& pool, int64_t block_len, int64_t max_tokens,
                                           std::span<const int32_t> shared = {});

  BlockTable(BlockTable&& other) noexcept;
  BlockTable& operator=(BlockTable&&) = delete;
  ~BlockTable();

  /// Takes blocks until `tokens` fit; tokens <= max_tokens.
  void grow_to(int64_t tokens);
  /// Appends a kept block in place of one that was promised.
  void adopt(int32_t block);
  /// Releases blocks()[index] for a kept block with the same contents.
  void replace(size_t index, int32_t block);

  const std::vector<int32_t>& blocks() const { return blocks_; }

 private:
  BlockTable(BlockPool& pool, int64_t block_len, int64_t promised, std::span<const int32_t> shared);

  BlockPool* pool_;
  int64_t block_len_;
  int64_t promised_;  // blocks still to take
  std::vector<int32_t> blocks_;
};

/// Blocks that hold `tokens` tokens.
constexpr int64_t blocks_for(int64_t tokens, int64_t block_len) {
  return (tokens + block_len - 1) / block_len;
}

}  // namespace longspan
