#include "kv/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <stdexcept>

#include "kv/block_table.h"

namespace longspan {
namespace {

TEST(BlockPool, PromisesNoMoreThanItHas) {
  BlockPool pool(3);
  EXPECT_TRUE(pool.promise(2));
  EXPECT_EQ(pool.num_available(), 1);
  EXPECT_FALSE(pool.promise(2));
  EXPECT_EQ(pool.num_available(), 1);
  EXPECT_TRUE(pool.promise(1));
  EXPECT_FALSE(pool.promise(1));
  EXPECT_FALSE(pool.promise(-1));
  pool.check_integrity();
}

TEST(BlockPool, RefusesBadBookkeeping) {
  BlockPool pool(2);
  EXPECT_THROW(pool.take(), std::logic_error);
  EXPECT_THROW(pool.withdraw(1), std::logic_error);
  ASSERT_TRUE(pool.promise(1));
  const int32_t id = pool.take();
  const int32_t other = 1 - id;
  EXPECT_THROW(pool.release({&other, 1}), std::logic_error);
  pool.release({&id, 1});
  EXPECT_THROW(pool.release({&id, 1}), std::logic_error);
}

/// Takes a block, keeps it and lets go of it.
int32_t add_idle(BlockPool& pool) {
  EXPECT_TRUE(pool.promise(1));
  const int32_t id = pool.take();
  pool.keep(id);
  pool.release({&id, 1});
  return id;
}

TEST(BlockPool, EvictsTheLeastRecentlyUsedIdleBlockAndOnlyWhenNothingIsFree) {
  BlockPool pool(4);
  std::vector<int32_t> evicted;
  pool.on_evict([&](int32_t id) { evicted.push_back(id); });
  const int32_t a = add_idle(pool);
  const int32_t b = add_idle(pool);
  const int32_t c = add_idle(pool);
  EXPECT_EQ(pool.num_available(), 4);
  EXPECT_EQ(pool.num_kept(), 3);
  ASSERT_TRUE(pool.share(a));  // used again: now the most recent
  pool.release({&a, 1});
  ASSERT_TRUE(pool.promise(3));
  pool.take();
  EXPECT_TRUE(evicted.empty());
  EXPECT_EQ(pool.take(), b);
  EXPECT_EQ(pool.take(), c);
  EXPECT_EQ(evicted, (std::vector<int32_t>{b, c}));
  EXPECT_TRUE(pool.is_kept(a));
  pool.check_integrity();
}

TEST(BlockPool, OfBlocksReleasedTogetherTheLastIsEvictedFirst) {
  BlockPool pool(3);
  std::vector<int32_t> evicted;
  pool.on_evict([&](int32_t id) { evicted.push_back(id); });
  ASSERT_TRUE(pool.promise(3));
  const std::vector<int32_t> blocks{pool.take(), pool.take(), pool.take()};
  for (const int32_t id : blocks) pool.keep(id);
  pool.release(blocks);
  ASSERT_TRUE(pool.promise(3));
  for (int i = 0; i < 3; ++i) pool.take();
  EXPECT_EQ(evicted, (std::vector<int32_t>{blocks[2], blocks[1], blocks[0]}));
}

TEST(BlockPool, SharedBlocksCountOnceAndAPromisedIdleBlockIsNotShared) {
  BlockPool pool(3);
  const int32_t a = add_idle(pool);
  const int32_t b = add_idle(pool);
  // Sharing both leaves one block, so two more cannot be promised; nothing changes.
  const std::vector<int32_t> both{a, b};
  EXPECT_FALSE(pool.promise(2, both));
  EXPECT_EQ(pool.num_available(), 3);
  ASSERT_TRUE(pool.promise(1, both));
  EXPECT_EQ(pool.num_available(), 0);
  EXPECT_TRUE(pool.promise(0, both));  // held already: costs nothing
  EXPECT_EQ(pool.num_holders(a), 2);
  pool.check_integrity();
  pool.release(both);
  pool.release(both);
  ASSERT_TRUE(pool.promise(2));
  EXPECT_FALSE(pool.share(a));  // all three are promised
  pool.check_integrity();
  EXPECT_THROW(pool.keep(a), std::logic_error);
  EXPECT_THROW(pool.share(3 - a - b), std::logic_error);
}

TEST(BlockTable, GrowsByWholeBlocksAndGivesAllBack) {
  BlockPool pool(4);
  {
    auto table = BlockTable::reserve(pool, 64, 200);
    ASSERT_TRUE(table);
    EXPECT_EQ(pool.num_available(), 0);
    table->grow_to(1);
    EXPECT_EQ(table->blocks().size(), 1U);
    table->grow_to(64);
    EXPECT_EQ(table->blocks().size(), 1U);
    table->grow_to(65);
    EXPECT_EQ(table->blocks().size(), 2U);
    EXPECT_FALSE(BlockTable::reserve(pool, 64, 1));
    const BlockTable moved(std::move(*table));
    EXPECT_EQ(moved.blocks().size(), 2U);
  }
  EXPECT_EQ(pool.num_available(), 4);
  pool.check_integrity();
}

TEST(BlockTable, AdoptsAndReplacesWithoutBreakingItsPromise) {
  BlockPool pool(4);
  const int32_t a = add_idle(pool);
  const int32_t b = add_idle(pool);
  {
    auto table = BlockTable::reserve(pool, 64, 4 * 64, {&a, 1});
    ASSERT_TRUE(table);
    EXPECT_EQ(pool.num_available(), 0);
    table->adopt(b);
    EXPECT_EQ(table->blocks(), (std::vector<int32_t>{a, b}));
    pool.check_integrity();
    table->grow_to(4 * 64);
    EXPECT_EQ(table->blocks().size(), 4U);
  }
  auto table = BlockTable::reserve(pool, 64, 4 * 64);
  ASSERT_TRUE(table);
  table->grow_to(64);
  table->replace(0, b);
  EXPECT_EQ(table->blocks(), std::vector<int32_t>{b});
  pool.check_integrity();
  table->grow_to(4 * 64);  // evicts a; b is held
  EXPECT_TRUE(pool.is_kept(b));
  EXPECT_FALSE(pool.is_kept(a));
  pool.check_integrity();
}

/// Random admissions, growth and departures; the books balance after each, and no block is ever in
/// two tables.
TEST(BlockTable, SurvivesThousandsOfRandomSteps) {
  std::mt19937 random(7);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  constexpr int64_t kBlockLen = 64;
  BlockPool pool(50);
  struct Tenant {
    BlockTable table;
    int64_t tokens;
    int64_t max_tokens;
  };
  std::vector<Tenant> tenants;
  int64_t admitted = 0;
  int64_t refused = 0;
  for (int step = 0; step < 20000; ++step) {
    switch (below(3)) {
      case 0: {
        const int64_t tokens = 1 + below(20 * kBlockLen);
        const bool fits = blocks_for(tokens, kBlockLen) <= pool.num_available();
        auto table = BlockTable::reserve(pool, kBlockLen, tokens);
        ASSERT_EQ(table.has_value(), fits);
        if (table) tenants.push_back({std::move(*table), 0, tokens});
        ++(fits ? admitted : refused);
        break;
      }
      case 1: {
        if (tenants.empty()) break;
        Tenant& tenant = tenants[below(std::ssize(tenants))];
        tenant.tokens = std::min(tenant.max_tokens, tenant.tokens + 1 + below(200));
        tenant.table.grow_to(tenant.tokens);
        ASSERT_EQ(std::ssize(tenant.table.blocks()), blocks_for(tenant.tokens, kBlockLen));
        break;
      }
      default: {
        if (tenants.empty()) break;
        // BlockTable cannot be assigned, so the survivors move to a new vector.
        const int64_t leaves = below(std::ssize(tenants));
        std::vector<Tenant> rest;
        for (int64_t i = 0; i < std::ssize(tenants); ++i) {
          if (i != leaves) rest.push_back(std::move(tenants[i]));
        }
        tenants.swap(rest);
      }
    }
    pool.check_integrity();
    std::set<int32_t> seen;
    for (const Tenant& tenant : tenants) {
      for (const int32_t id : tenant.table.blocks()) ASSERT_TRUE(seen.insert(id).second);
    }
  }
  EXPECT_GT(admitted, 1000);
  EXPECT_GT(refused, 100);
  tenants.clear();
  EXPECT_EQ(pool.num_available(), 50);
}

}  // namespace
}  // namespace longspan
