// The work list of the sm_90a prefill kernel, made on the host: every row of every head once,
// within the size that is planned for, in shares that end together.

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "backend/cuda/prefill_schedule_sm90.h"

namespace longspan::cuda {
namespace {

struct Model {
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
};
constexpr Model kModels[] = {{32, 8, 128}, {9, 3, 64}, {16, 16, 128}, {64, 1, 64}, {6, 2, 128}};

TEST(PrefillScheduleSm90, CoversEveryRowOfEveryHeadOnce) {
  const std::vector<PrefillSeq> seqs{{0, 1000, 500}, {2, 1, 0},    {5, 128, 70000},
                                     {6, 129, 3},    {7, 8192, 0}, {8, 384, 20}};
  for (const Model& m : kModels) {
    for (const int32_t num_sms : {1, 2, 132}) {
      const PrefillSchedule schedule =
          schedule_prefill_sm90(seqs, m.num_heads, m.num_kv_heads, m.head_dim, num_sms);
      ASSERT_EQ(schedule.first.size(), static_cast<size_t>(prefill_clusters_sm90(num_sms)) + 1);
      EXPECT_TRUE(std::ranges::is_sorted(schedule.first));
      EXPECT_EQ(schedule.first.front(), 0);
      EXPECT_EQ(schedule.first.back(), static_cast<int32_t>(schedule.tiles.size()));

      const bool head_pairs = m.num_heads / m.num_kv_heads % 2 == 0;
      const int32_t rows = prefill_rows_sm90(m.head_dim);
      std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
      for (const PrefillTile& tile : schedule.tiles) {
        EXPECT_TRUE(seen.emplace(tile.seq, tile.head, tile.row).second);
        EXPECT_TRUE(seen.emplace(tile.seq, tile.head + (head_pairs ? 1 : 0),
                                 tile.row + (head_pairs ? 0 : rows))
                        .second);
        EXPECT_TRUE(!head_pairs || tile.head % 2 == 0);  // of one KV head
      }
      int64_t num_rows = 0;
      for (const PrefillSeq& seq : seqs) {
        num_rows += seq.num_rows;
        for (int32_t head = 0; head < m.num_heads; ++head) {
          for (int32_t row = 0; row < seq.num_rows; row += rows) {
            EXPECT_TRUE(seen.contains({seq.seq, head, row}));
          }
        }
      }
      EXPECT_LE(static_cast<int64_t>(schedule.tiles.size()),
                max_prefill_tiles_sm90(static_cast<int64_t>(seqs.size()), num_rows, m.num_heads,
                                       m.num_kv_heads, m.head_dim));
    }
  }
}

TEST(PrefillScheduleSm90, ClustersEndTogether) {
  for (const Model& m : kModels) {
    for (const int32_t rows : {4096, 8192, 16384}) {
      const PrefillSeq seq{0, rows, 0};
      const PrefillSchedule schedule =
          schedule_prefill_sm90({&seq, 1}, m.num_heads, m.num_kv_heads, m.head_dim, 132);
      int64_t total = 0;
      int64_t longest = 0;
      for (size_t c = 0; c + 1 < schedule.first.size(); ++c) {
        int64_t keys = 0;
        for (int32_t t = schedule.first[c]; t < schedule.first[c + 1]; ++t) {
          keys += schedule.tiles[static_cast<size_t>(t)].row + prefill_rows_sm90(m.head_dim);
        }
        total += keys;
        longest = std::max(longest, keys);
      }
      // A cluster's share cannot be less than its longest tile, that of the last rows.
      const int64_t floor = std::max<int64_t>(rows, total / 66);
      EXPECT_LT(static_cast<double>(longest), 1.15 * static_cast<double>(floor))
          << m.num_heads << " heads, " << rows << " rows";
    }
  }
}

}  // namespace
}  // namespace longspan::cuda
