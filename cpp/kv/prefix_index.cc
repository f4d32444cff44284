#include "kv/prefix_index.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <type_traits>

namespace longspan {
namespace {

int64_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

}  // namespace

template <class A, class B>
bool PrefixIndex::ByTokens::operator()(const A& a, const B& b) const {
  const auto tokens = [](const auto& x) -> std::span<const int32_t> {
    if constexpr (std::is_pointer_v<std::remove_cvref_t<decltype(x)>>) {
      return x->tokens;
    } else {
      return x;
    }
  };
  return std::ranges::lexicographical_compare(tokens(a), tokens(b));
}

PrefixIndex::PrefixIndex(BlockPool& pool, int64_t block_len)
    : pool_(pool), block_len_(block_len), nodes_(static_cast<size_t>(pool.num_blocks())) {
  pool.on_evict([this](int32_t block) { evict(block); });
}

const PrefixIndex::Node* PrefixIndex::node_of(const std::string& key, int32_t parent) const {
  if (parent != kRoot) return nodes_.at(static_cast<size_t>(parent)).get();
  const auto root = roots_.find(key);
  return root == roots_.end() ? nullptr : &root->second;
}

PrefixIndex::Match PrefixIndex::find(const std::string& key, int32_t parent,
                                     std::span<const int32_t> tokens) const {
  const Node* node = node_of(key, parent);
  if (node == nullptr) return {};
  const auto wanted = tokens.first(std::min(tokens.size(), static_cast<size_t>(block_len_)));
  Match best;
  const auto consider = [&](const Node& child) {
    const int64_t common = common_prefix(child.tokens, wanted);
    if (common > best.tokens) best = {child.block, common};
  };
  const auto next = node->children.lower_bound(wanted);
  if (next != node->children.end()) consider(**next);
  if (next != node->children.begin()) consider(**std::prev(next));
  return best;
}

std::vector<int32_t> PrefixIndex::find_whole(const std::string& key,
                                             std::span<const int32_t> tokens) const {
  std::vector<int32_t> blocks;
  int32_t parent = kRoot;
  while (std::ssize(tokens) >= block_len_) {
    const Match match = find(key, parent, tokens);
    if (match.tokens < block_len_) break;
    blocks.push_back(match.block);
    parent = match.block;
    tokens = tokens.subspan(static_cast<size_t>(block_len_));
  }
  return blocks;
}

int32_t PrefixIndex::insert(const std::string& key, int32_t parent, std::span<const int32_t> tokens,
                            int32_t block) {
  if (tokens.empty() || std::ssize(tokens) > block_len_) {
    throw std::logic_error("[prefix_index] expected 1 to block_len tokens");
  }
  const Match known = find(key, parent, tokens);
  if (known.tokens == std::ssize(tokens)) return known.block;
  Node* above = nullptr;
  if (parent == kRoot) {
    const auto root = roots_.try_emplace(key).first;
    above = &root->second;
    above->key = &root->first;
  } else {
    above = nodes_.at(static_cast<size_t>(parent)).get();
    if (above == nullptr || std::ssize(above->tokens) < block_len_) {
      throw std::logic_error("[prefix_index] expected a whole block of the index as parent");
    }
  }
  pool_.keep(block);
  auto node = std::make_unique<Node>();
  node->tokens.assign(tokens.begin(), tokens.end());
  node->block = block;
  node->parent = above;
  above->children.insert(node.get());
  nodes_[static_cast<size_t>(block)] = std::move(node);
  return block;
}

void PrefixIndex::evict(int32_t block) {
  std::unique_ptr<Node>& node = nodes_.at(static_cast<size_t>(block));
  if (node == nullptr || !node->children.empty()) {
    throw std::logic_error("[prefix_index] eviction of a block that others build on");
  }
  Node* parent = node->parent;
  parent->children.erase(node.get());
  node.reset();
  ++num_evicted_;
  if (parent->key != nullptr && parent->children.empty()) roots_.erase(roots_.find(*parent->key));
}

void PrefixIndex::check_integrity() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(what);
  };
  int64_t nodes = 0;
  for (size_t id = 0; id < nodes_.size(); ++id) {
    const Node* node = nodes_[id].get();
    require((node != nullptr) == pool_.is_kept(static_cast<int32_t>(id)),
            "[prefix_index] index and pool disagree about what is kept");
    if (node == nullptr) continue;
    ++nodes;
    require(node->block == static_cast<int32_t>(id), "[prefix_index] node of another block");
    require(node->parent->children.contains(nodes_[id].get()), "[prefix_index] node not reachable");
    require(node->children.empty() || std::ssize(node->tokens) == block_len_,
            "[prefix_index] a partial block has children");
    require(node->parent->key != nullptr ||
                pool_.num_holders(node->parent->block) >= pool_.num_holders(node->block),
            "[prefix_index] a block is held and its parent is not");
  }
  for (const auto& [key, root] : roots_) {
    require(root.key == &key && !root.children.empty(), "[prefix_index] an empty root");
  }
  require(nodes == pool_.num_kept(), "[prefix_index] kept blocks miscounted");
}

}  // namespace longspan
