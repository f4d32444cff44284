#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace longspan {

/// Accounts for the KV blocks of one pool: which are free, which are held, how many are promised.
/// Integers only; the memory belongs to KvCache. Not thread-safe: the engine thread owns it.
class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  int64_t num_blocks() const { return static_cast<int64_t>(held_.size()); }
  /// Blocks neither held nor promised.
  int64_t num_available() const { return static_cast<int64_t>(free_.size()) - promised_; }

  /// Promises `count` blocks to a later take(); false, and nothing changes, when there are fewer.
  bool promise(int64_t count);
  /// Gives back part of a promise.
  void withdraw(int64_t count);
  /// Turns one promised block into a held one and returns its id in [0, num_blocks).
  int32_t take();
  /// Returns held blocks.
  void release(std::span<const int32_t> blocks);

  /// Throws std::logic_error when the books do not balance. For tests.
  void check_integrity() const;

 private:
  std::vector<int32_t> free_;  // a stack: blocks used last are warm, fresh memory stays untouched
  std::vector<bool> held_;     // [num_blocks]
  int64_t promised_ = 0;
};

}  // namespace longspan
