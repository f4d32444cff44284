#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "kv/block_pool.h"

namespace longspan {

/// Finds the blocks whose tokens, and all the tokens before them, are those of a new sequence: a
/// tree whose nodes are blocks, each with its tokens, under one root per key. Keys and tokens are
/// compared whole; nothing is hashed, so nothing can be mistaken for another.
///
/// Who holds a block must hold every block above it, so that leaves are the first to be evicted.
/// A block of fewer than block_len tokens is a leaf and is there to be copied from.
class PrefixIndex {
 public:
  /// Follows the pool's evictions; the pool must outlive it.
  PrefixIndex(BlockPool& pool, int64_t block_len);
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  static constexpr int32_t kRoot = -1;  ///< as parent: the first block of a sequence

  /// A block whose first `tokens` tokens are the wanted ones; 0: there is none.
  struct Match {
    int32_t block = -1;
    int64_t tokens = 0;
  };

  /// Of the blocks after `parent`, the one that shares most of `tokens` from their beginning; of
  /// tokens only the first block_len are looked at. key: matters where parent is kRoot.
  Match find(const std::string& key, int32_t parent, std::span<const int32_t> tokens) const;

  /// The longest run of whole blocks that tokens begins with.
  std::vector<int32_t> find_whole(const std::string& key, std::span<const int32_t> tokens) const;

  /// Enters a held block with the keys and values of 1 to block_len tokens after `parent`, and
  /// keeps it. Returns the block in the index: another one where these tokens were known already.
  int32_t insert(const std::string& key, int32_t parent, std::span<const int32_t> tokens,
                 int32_t block);

  int64_t num_evicted() const { return num_evicted_; }

  /// Throws std::logic_error when index and pool disagree. For tests.
  void check_integrity() const;

 private:
  struct Node;
  /// Compares nodes, and nodes with tokens, by their tokens in lexicographic order, in which the
  /// node that shares most with given tokens is next to where these would stand.
  struct ByTokens {
    using is_transparent = void;
    template <class A, class B>
    bool operator()(const A& a, const B& b) const;
  };
  struct Node {
    std::vector<int32_t> tokens;
    int32_t block = kRoot;
    Node* parent = nullptr;            // null: a root
    const std::string* key = nullptr;  // of a root
    std::set<Node*, ByTokens> children;
  };

  const Node* node_of(const std::string& key, int32_t parent) const;
  void evict(int32_t block);

  BlockPool& pool_;
  const int64_t block_len_;
  std::map<std::string, Node> roots_;         // those with children
  std::vector<std::unique_ptr<Node>> nodes_;  // [num_blocks], null where a block is not kept
  int64_t num_evicted_ = 0;
};

}  // namespace longspan
