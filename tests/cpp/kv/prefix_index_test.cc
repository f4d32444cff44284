#include "kv/prefix_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <vector>

namespace longspan {
namespace {

using Tokens = std::vector<int32_t>;
constexpr int32_t kRoot = PrefixIndex::kRoot;

int32_t take(BlockPool& pool) {
  EXPECT_TRUE(pool.promise(1));
  return pool.take();
}

TEST(PrefixIndex, FindsWhatWasEnteredUnderTheSameKeyAndParent) {
  BlockPool pool(10);
  PrefixIndex index(pool, 4);
  const int32_t a = take(pool);
  const int32_t b = take(pool);
  EXPECT_EQ(index.insert("x", kRoot, Tokens{1, 2, 3, 4}, a), a);
  EXPECT_EQ(index.insert("x", a, Tokens{5, 6, 7, 8}, b), b);
  index.check_integrity();
  const Tokens path{1, 2, 3, 4, 5, 6, 7, 8, 9};
  EXPECT_EQ(index.find_whole("x", path), (std::vector<int32_t>{a, b}));
  EXPECT_EQ(index.find_whole("x", Tokens(path.begin(), path.begin() + 7)), std::vector<int32_t>{a});
  EXPECT_TRUE(index.find_whole("y", path).empty());
  EXPECT_TRUE(index.find_whole("", path).empty());
  EXPECT_EQ(index.find("x", kRoot, Tokens{5, 6, 7, 8}).tokens, 0);  // has another parent
  EXPECT_EQ(index.find("x", b, Tokens{9}).tokens, 0);
}

TEST(PrefixIndex, FindsTheBlockThatSharesMostFromTheBeginning) {
  BlockPool pool(10);
  PrefixIndex index(pool, 4);
  const std::vector<Tokens> blocks{{1}, {1, 2, 3, 4}, {1, 2, 9, 9}, {0, 2, 3, 4}, {1, 2, 3}};
  std::vector<int32_t> ids;
  for (const Tokens& tokens : blocks) {
    const int32_t id = take(pool);
    ids.push_back(index.insert("", kRoot, tokens, id));
  }
  // {1, 2, 3} is the beginning of a block that is known.
  EXPECT_EQ(ids[4], ids[1]);
  EXPECT_EQ(pool.num_kept(), 4);
  const auto expect = [&](const Tokens& wanted, int64_t tokens, int32_t block) {
    const PrefixIndex::Match match = index.find("", kRoot, wanted);
    EXPECT_EQ(match.tokens, tokens);
    EXPECT_EQ(match.block, block);
  };
  expect({1, 2, 3, 4, 5}, 4, ids[1]);
  expect({1, 2, 3, 5}, 3, ids[1]);
  expect({1, 2, 9}, 3, ids[2]);
  expect({1, 2, 9, 8, 7}, 3, ids[2]);
  expect({0, 1}, 1, ids[3]);
  expect({2, 2, 3, 4}, 0, -1);
  expect({}, 0, -1);
  EXPECT_EQ(index.find("", kRoot, Tokens{1, 7}).tokens, 1);
}

TEST(PrefixIndex, ForgetsWhatIsEvictedLeavesFirst) {
  BlockPool pool(3);
  PrefixIndex index(pool, 2);
  const std::vector<int32_t> blocks{take(pool), take(pool), take(pool)};
  index.insert("", kRoot, Tokens{1, 1}, blocks[0]);
  index.insert("", blocks[0], Tokens{2, 2}, blocks[1]);
  index.insert("", blocks[1], Tokens{3}, blocks[2]);
  pool.release(blocks);
  const Tokens path{1, 1, 2, 2, 3, 3};
  for (int64_t left = 2; left >= 0; --left) {
    take(pool);
    EXPECT_EQ(std::ssize(index.find_whole("", path)), left);
    index.check_integrity();
    pool.check_integrity();
  }
  EXPECT_EQ(index.num_evicted(), 3);
}

TEST(PrefixIndex, RefusesBadBookkeeping) {
  BlockPool pool(3);
  PrefixIndex index(pool, 2);
  const int32_t a = take(pool);
  const int32_t b = take(pool);
  index.insert("", kRoot, Tokens{1}, a);
  EXPECT_THROW(index.insert("", a, Tokens{2}, b), std::logic_error);  // after a partial block
  EXPECT_THROW(index.insert("", b, Tokens{2}, b), std::logic_error);  // after one it does not know
  EXPECT_THROW(index.insert("", kRoot, Tokens{}, b), std::logic_error);
  EXPECT_THROW(index.insert("", kRoot, Tokens{1, 2, 3}, b), std::logic_error);
  EXPECT_THROW(index.insert("", kRoot, Tokens{7}, 3 - a - b), std::logic_error);  // not held
}

/// Against a search through all blocks, over random trees of few tokens, so that much is shared.
TEST(PrefixIndex, FindsAsASearchThroughEverythingWould) {
  std::mt19937 random(5);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  constexpr int64_t kBlockLen = 5;
  struct Entry {
    std::string key;
    int32_t parent;
    Tokens tokens;
    int32_t block;
  };
  for (int round = 0; round < 50; ++round) {
    BlockPool pool(60);
    PrefixIndex index(pool, kBlockLen);
    std::vector<Entry> entries;
    const auto random_tokens = [&](int64_t count) {
      Tokens tokens;
      for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(below(3)));
      return tokens;
    };
    const auto random_place = [&]() -> std::pair<std::string, int32_t> {
      if (!entries.empty() && below(3) > 0) {
        const Entry& above = entries[below(std::ssize(entries))];
        if (std::ssize(above.tokens) == kBlockLen) return {above.key, above.block};
      }
      return {below(2) == 0 ? "a" : "b", kRoot};
    };
    const auto search = [&](const std::string& key, int32_t parent, const Tokens& tokens) {
      int64_t most = 0;
      for (const Entry& entry : entries) {
        if (entry.parent != parent || (parent == kRoot && entry.key != key)) continue;
        const auto common = std::ranges::mismatch(entry.tokens, tokens).in1;
        most = std::max<int64_t>(most, common - entry.tokens.begin());
      }
      return most;
    };
    for (int step = 0; step < 300; ++step) {
      const auto [key, parent] = random_place();
      const Tokens tokens = random_tokens(1 + below(kBlockLen));
      const int64_t expected = search(key, parent, tokens);
      const PrefixIndex::Match match = index.find(key, parent, tokens);
      ASSERT_EQ(match.tokens, expected);
      if (expected > 0) {
        const auto entry = std::ranges::find(entries, match.block, &Entry::block);
        ASSERT_TRUE(entry != entries.end() && entry->parent == parent);
        ASSERT_TRUE(std::ranges::equal(std::span(entry->tokens).first(expected),
                                       std::span(tokens).first(expected)));
      }
      if (pool.num_available() > 0 && below(2) == 0) {
        const int32_t block = take(pool);
        const int32_t known = index.insert(key, parent, tokens, block);
        ASSERT_EQ(known == block, expected < std::ssize(tokens));
        if (known == block) entries.push_back({key, parent, tokens, block});
        if (known != block) pool.release({&block, 1});
      }
      pool.check_integrity();
    }
  }
}

}  // namespace
}  // namespace longspan
