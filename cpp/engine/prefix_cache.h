#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/sequence.h"
#include "kv/prefix_index.h"

namespace longspan {

/// Lets sequences share the blocks of what they begin with alike. A block is published as soon as
/// it is full, while its sequence still runs; the last, partly filled one when the sequence ends.
/// Whole blocks are shared as they are; of a block that agrees only in its first tokens, these are
/// copied to a block of the sequence's own.
class PrefixCache {
 public:
  /// Copies the first `tokens` tokens of a block to another.
  using CopyBlock = std::function<void(int32_t from, int32_t to, int64_t tokens)>;

  PrefixCache(BlockPool& pool, int64_t block_len, CopyBlock copy)
      : pool_(pool), block_len_(block_len), index_(pool, block_len), copy_(std::move(copy)) {}

  /// The whole blocks that a sequence could begin with now. Its last token, and every token whose
  /// row is asked for, is left to be computed.
  std::vector<int32_t> match(const Sequence& sequence) const;

  /// The blocks that hold all tokens of a sequence, the last one perhaps more than them; of the
  /// first ones alone where the others are not known.
  std::vector<int32_t> find(const Sequence& sequence) const;

  /// Moves a sequence on over whole blocks that are known by now.
  void reuse_whole(Sequence& sequence);
  /// Moves a sequence on within its next block by copying from one that begins alike.
  void reuse_part(Sequence& sequence);

  /// Whether the next block of `sequence` is among those that the next num_tokens of `other` fill.
  bool will_fill_next_block_of(const Sequence& sequence, const Sequence& other,
                               int64_t num_tokens) const;

  /// Enters the blocks that a running sequence has filled.
  void publish(Sequence& sequence);
  /// The same when the sequence ends, its last block included.
  void retire(Sequence& sequence);

  int64_t num_evicted() const { return index_.num_evicted(); }
  void check_integrity() const { index_.check_integrity(); }

 private:
  PrefixIndex::Match find_next(const Sequence& sequence) const;
  int32_t insert(const Sequence& sequence, int64_t block, int64_t tokens);
  /// Whether the sequence stands where its next block begins and has not taken that block.
  bool between_blocks(const Sequence& sequence) const;

  BlockPool& pool_;
  const int64_t block_len_;
  PrefixIndex index_;
  const CopyBlock copy_;
};

/// What two profiles must have in common for keys and values to be the same: all that enters their
/// computation, bit for bit. Opaque bytes.
std::string prefix_key(const RopeProfile& profile);

}  // namespace longspan
