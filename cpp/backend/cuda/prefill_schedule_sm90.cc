#include "backend/cuda/prefill_schedule_sm90.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>

namespace longspan::cuda {
namespace {

constexpr int64_t kKeys = 128;    // of a step of the kernel's loop
constexpr int64_t kTileCost = 2;  // of beginning and ending a tile, in such steps
// Sharing keys in the L2 cache is worth this much of the time.
constexpr double kSharingGain = 0.05;

/// What a cluster takes on at once.
struct Unit {
  int32_t heads;
  int32_t rows;

  Unit(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim)
      : heads(num_heads / num_kv_heads % 2 == 0 ? 2 : 1),
        rows(prefill_rows_sm90(head_dim) * (2 / heads)) {}
};

struct Costed {
  PrefillTile tile;
  int64_t cost;
};

struct Dealt {
  std::vector<std::vector<PrefillTile>> clusters;
  int64_t longest = 0;
};

/// Each tile in turn goes to the cluster that is free first.
Dealt deal(const std::vector<Costed>& tiles, int32_t num_clusters) {
  using Load = std::pair<int64_t, int32_t>;  // cost so far, cluster
  std::priority_queue<Load, std::vector<Load>, std::greater<>> free_first;
  for (int32_t c = 0; c < num_clusters; ++c) free_first.emplace(0, c);
  Dealt dealt;
  dealt.clusters.resize(static_cast<size_t>(num_clusters));
  for (const Costed& next : tiles) {
    const auto [busy, cluster] = free_first.top();
    free_first.pop();
    free_first.emplace(busy + next.cost, cluster);
    dealt.clusters[static_cast<size_t>(cluster)].push_back(next.tile);
    dealt.longest = std::max(dealt.longest, busy + next.cost);
  }
  return dealt;
}

}  // namespace

PrefillSchedule schedule_prefill_sm90(std::span<const PrefillSeq> seqs, int32_t num_heads,
                                      int32_t num_kv_heads, int32_t head_dim, int32_t num_sms) {
  const int32_t group = num_heads / num_kv_heads;
  const Unit unit(num_heads, num_kv_heads, head_dim);

  std::vector<PrefillSeq> longest_first(seqs.begin(), seqs.end());
  std::ranges::stable_sort(longest_first, std::greater{},
                           [](const PrefillSeq& s) { return s.keys(s.num_rows); });
  std::vector<Costed> tiles;
  for (const PrefillSeq& seq : longest_first) {
    const int32_t last_row = (seq.num_rows - 1) / unit.rows * unit.rows;
    for (int32_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      for (int32_t row = last_row; row >= 0; row -= unit.rows) {
        const int64_t keys = seq.keys(std::min(row + unit.rows, seq.num_rows));
        if (keys == 0) continue;
        for (int32_t h = 0; h < group; h += unit.heads) {
          tiles.push_back(
              {{seq.seq, kv_head * group + h, row}, (keys + kKeys - 1) / kKeys + kTileCost});
        }
      }
    }
  }

  // KV head by KV head, unless that leaves clusters idle at the end which the longest first do not.
  const int32_t num_clusters = prefill_clusters_sm90(num_sms);
  Dealt dealt = deal(tiles, num_clusters);
  std::ranges::stable_sort(tiles, std::greater{}, &Costed::cost);
  Dealt even = deal(tiles, num_clusters);
  if (static_cast<double>(even.longest) < (1 - kSharingGain) * static_cast<double>(dealt.longest)) {
    dealt = std::move(even);
  }

  PrefillSchedule schedule;
  schedule.first.push_back(0);
  for (const std::vector<PrefillTile>& cluster : dealt.clusters) {
    schedule.tiles.insert(schedule.tiles.end(), cluster.begin(), cluster.end());
    schedule.first.push_back(static_cast<int32_t>(schedule.tiles.size()));
  }
  return schedule;
}

int64_t max_prefill_tiles_sm90(int64_t max_seqs, int64_t max_rows, int32_t num_heads,
                               int32_t num_kv_heads, int32_t head_dim) {
  const Unit unit(num_heads, num_kv_heads, head_dim);
  return (max_rows / unit.rows + max_seqs) * (num_heads / unit.heads);
}

}  // namespace longspan::cuda
