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
