#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <span>
#include <vector>

namespace longspan {

/// Accounts for the KV blocks of one pool. A block is free; or held, by one or more sequences; or
/// idle: kept for what it contains though nobody holds it. Idle blocks can be promised like free
/// ones, and are evicted, least recently used first, when a promise is kept.
/// Integers only; the memory belongs to KvCache. Not thread-safe: the engine thread owns it.
class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  /// Blocks neither held nor promised.
  int64_t num_available() const {
    return static_cast<int64_t>(free_.size() + idle_.size()) - promised_;
  }
  /// Blocks that are kept, held or idle.
  int64_t num_kept() const { return num_kept_; }

  /// Promises `count` blocks to a later take() and adds a holder to each of `shared`, kept blocks;
  /// false, and nothing changes, when there are fewer.
  bool promise(int64_t count, std::span<const int32_t> shared = {});
  /// Gives back part of a promise.
  void withdraw(int64_t count);
  /// Turns one promised block into a held one and returns its id in [0, num_blocks).
  int32_t take();
  /// Adds a holder to a held or idle block; false when it is idle and promised away.
  bool share(int32_t block);
  /// Takes a holder from each block, the last first, so that of blocks that become idle together
  /// the last is evicted first.
  void release(std::span<const int32_t> blocks);

  /// Keeps a held block when its last holder releases it, until it is evicted.
  void keep(int32_t block);
  /// Called with each block that is evicted, before it is handed out again.
  void on_evict(std::function<void(int32_t block)> evicted) { evicted_ = std::move(evicted); }

  int64_t num_holders(int32_t block) const { return at(block).holders; }
  bool is_kept(int32_t block) const { return at(block).kept; }

  /// Throws std::logic_error when the books do not balance. For tests.
  void check_integrity() const;

 private:
  struct Block {
    int32_t holders = 0;
    bool kept = false;
    std::list<int32_t>::iterator idle;  // its place in idle_, when there
  };

  const Block& at(int32_t block) const { return blocks_.at(static_cast<size_t>(block)); }
  Block& at(int32_t block) { return blocks_.at(static_cast<size_t>(block)); }
  bool is_idle(const Block& block) const { return block.kept && block.holders == 0; }
  void hold(int32_t id);

  std::vector<Block> blocks_;  // [num_blocks]
  std::vector<int32_t> free_;  // a stack: blocks used last are warm, fresh memory stays untouched
  std::list<int32_t> idle_;    // least recently used first
  int64_t promised_ = 0;       // <= free and idle
  int64_t num_kept_ = 0;
  std::function<void(int32_t)> evicted_;
};

}  // namespace longspan
