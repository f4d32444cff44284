#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "engine/prefix_cache.h"
#include "engine/rank_group.h"
#include "longspan/context.h"

namespace longspan {

/// The blocks of contexts that are being saved or loaded, each context under a number. They keep
/// their room while the engine goes on with requests between two calls. For the engine's thread
/// alone.
class ContextBlocks {
 public:
  /// All of one engine, which outlive it.
  ContextBlocks(BlockPool& pool, PrefixCache& prefix_cache, RankGroup& ranks, int64_t block_len)
      : pool_(pool), prefix_cache_(prefix_cache), ranks_(ranks), block_len_(block_len) {}

  /// Holds the cached blocks of a context. Throws CapacityError where they are not all there.
  int64_t hold(const Context& context);

  /// Takes blocks for a context, but for its first ones that are known already. Throws
  /// CapacityError where there is no room now.
  struct Room {
    int64_t id = 0;
    int64_t known_blocks = 0;
  };
  Room take(const Context& context);

  /// Keys and values of the first `tokens` tokens of block number `index` of a context, in the
  /// order of RankGroup::kv_rows(tokens).
  void read(int64_t id, int64_t index, int64_t tokens, std::span<std::byte> rows);
  void write(int64_t id, int64_t index, int64_t tokens, std::vector<std::byte>& rows);

  /// Enters the blocks, all of which are written, into the prefix cache.
  void publish(int64_t id);

  /// Lets a context go; nothing where that has happened.
  void release(int64_t id) { open_.erase(id); }

 private:
  int64_t open(std::unique_ptr<Sequence> sequence);
  int32_t block(int64_t id, int64_t index) const {
    return open_.at(id)->blocks->blocks().at(static_cast<size_t>(index));
  }

  BlockPool& pool_;
  PrefixCache& prefix_cache_;
  RankGroup& ranks_;
  const int64_t block_len_;
  int64_t next_id_ = 0;
  std::map<int64_t, std::unique_ptr<Sequence>> open_;
};

}  // namespace longspan
