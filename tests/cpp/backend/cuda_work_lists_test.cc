// The work lists of the CUDA backend's attention, made on the host: every key of every pair once,
// within the bounds that workspaces are planned from.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <utility>

#include "backend/cuda/decode_spans.h"
#include "backend/cuda/prefill_passes.h"
#include "backend/cuda/prefill_tiles.h"

namespace longspan::cuda {
namespace {

struct Model {
  int64_t num_heads;
  int64_t num_kv_heads;
};
constexpr int64_t kSlots = 264;  // of an H100
constexpr Model kModels[] = {{32, 8}, {9, 3}, {16, 16}, {64, 1}, {40, 2}};

std::vector<DecodeSeq> random_seqs(uint32_t seed, int64_t max_rows, int64_t max_keys) {
  std::mt19937 random(seed);
  const auto up_to = [&](int64_t most) {
    return std::uniform_int_distribution<int64_t>(1, most)(random);
  };
  std::vector<DecodeSeq> seqs;
  const int64_t count = up_to(20);
  for (int64_t i = 0; i < count; ++i) {
    DecodeSeq seq;
    seq.seq = static_cast<int32_t>(3 * i);  // those between prefill
    seq.num_rows = static_cast<int32_t>(up_to(max_rows));
    // As many short ones as long ones.
    seq.num_keys = std::max<int64_t>(seq.num_rows, up_to(i % 2 == 0 ? max_keys : 2000));
    seqs.push_back(seq);
  }
  return seqs;
}

TEST(DecodeSpans, CoverEveryKeyOfEveryPairOnce) {
  for (const Model& model : kModels) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const std::vector<DecodeSeq> seqs = random_seqs(seed, 5, 300000);
      const DecodeSpans work(seqs, model.num_heads, model.num_kv_heads, kSlots);
      std::map<std::tuple<int32_t, int32_t>, int64_t> keys;  // (seq, pair) -> keys seen
      for (const DecodeSpan& span : work.spans()) {
        EXPECT_EQ(span.first_key % kMinDecodeSpan, 0);
        EXPECT_GT(span.num_keys, 0);
        EXPECT_GT(span.num_pairs, 0);
        EXPECT_LE(span.num_pairs, kDecodePairs);
        for (int32_t pair = span.first_pair; pair < span.first_pair + span.num_pairs; ++pair) {
          keys[{span.seq, pair}] += span.num_keys;
        }
      }
      size_t pairs = 0;
      for (const DecodeSeq& seq : seqs) {
        for (int32_t pair = 0; pair < seq.num_rows * model.num_heads / model.num_kv_heads; ++pair) {
          EXPECT_EQ((keys[{seq.seq, pair}]), seq.num_keys);
          ++pairs;
        }
      }
      EXPECT_EQ(keys.size(), pairs);
    }
  }
}

TEST(DecodeSpans, EveryPartialRowIsWrittenOnceAndMerged) {
  for (const Model& model : kModels) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const DecodeSpans work(random_seqs(seed, 5, 300000), model.num_heads, model.num_kv_heads,
                             kSlots);
      // Where the merge of a run of pairs looks for its spans, in order of their keys.
      std::map<int32_t, std::tuple<int32_t, int32_t, int32_t>> expected;
      for (const DecodeMerge& merge : work.merges()) {
        EXPECT_GE(merge.num_spans, 2);
        EXPECT_LE(merge.num_spans, kMaxDecodeSplits);
        for (int32_t i = 0; i < merge.num_spans; ++i) {
          const auto row =
              static_cast<int32_t>(merge.partial + i * model.num_kv_heads * merge.num_pairs);
          EXPECT_TRUE(expected.emplace(row, std::tuple{merge.seq, merge.first_pair, i}).second);
        }
      }
      int64_t rows = 0;
      for (const DecodeSpan& span : work.spans()) {
        if (span.partial < 0) continue;
        ASSERT_TRUE(expected.contains(span.partial));
        const auto [seq, first_pair, index] = expected[span.partial];
        EXPECT_EQ(span.seq, seq);
        EXPECT_EQ(span.first_pair, first_pair);
        EXPECT_GE(span.first_key, index * kMinDecodeSpan);
        expected.erase(span.partial);
        rows += model.num_kv_heads * span.num_pairs;
      }
      EXPECT_TRUE(expected.empty());
      EXPECT_EQ(rows, work.partial_rows());
    }
  }
}

TEST(DecodeSpans, StayWithinTheSizesPlanned) {
  for (const Model& model : kModels) {
    for (const int64_t max_keys : {600, 5000, 32768, 32769, 300000}) {
      for (uint32_t seed = 0; seed < 20; ++seed) {
        std::vector<DecodeSeq> seqs = random_seqs(seed, 5, max_keys);
        for (DecodeSeq& seq : seqs) seq.num_keys = std::min(seq.num_keys, max_keys);
        const DecodeSpans work(seqs, model.num_heads, model.num_kv_heads, kSlots);
        const DecodeSizes sizes = max_decode_sizes(static_cast<int64_t>(seqs.size()), 5, max_keys,
                                                   model.num_heads, model.num_kv_heads);
        EXPECT_LE(work.spans().size(), sizes.spans);
        EXPECT_LE(work.merges().size(), sizes.merges);
        EXPECT_LE(work.partial_rows(), sizes.partial_rows);
      }
    }
  }
}

TEST(DecodeSpans, RunsOfPairsThatReadTheSameKeysAreNeighbours) {
  const DecodeSpans work(random_seqs(3, 5, 300000), 64, 1, kSlots);
  std::set<std::pair<int32_t, int32_t>> seen;  // (seq, first key)
  const DecodeSpan* last = nullptr;
  size_t neighbours = 0;
  for (const DecodeSpan& span : work.spans()) {
    if (last != nullptr && span.seq == last->seq && span.first_key == last->first_key) {
      EXPECT_EQ(span.first_pair, last->first_pair + kDecodePairs);
      ++neighbours;
    } else {
      EXPECT_TRUE(seen.emplace(span.seq, span.first_key).second);
      EXPECT_EQ(span.first_pair, 0);
    }
    last = &span;
  }
  EXPECT_GT(neighbours, 0);
}

TEST(DecodeSpans, ASequenceIsSplitAlikeInAnyCompany) {
  const auto bounds = [](const DecodeSpans& work, int32_t seq) {
    std::set<std::pair<int32_t, int32_t>> result;
    for (const DecodeSpan& span : work.spans()) {
      if (span.seq == seq) result.emplace(span.first_key, span.num_keys);
    }
    return result;
  };
  const std::vector<DecodeSeq> seqs = random_seqs(1, 1, 1000000);
  const DecodeSpans together(seqs, 32, 8, kSlots);
  for (const DecodeSeq& seq : seqs) {
    EXPECT_EQ(bounds(DecodeSpans({&seq, 1}, 32, 8, kSlots), seq.seq), bounds(together, seq.seq));
  }
}

TEST(DecodeSpans, AreAsLongAsStillFillsTheDevice) {
  // 33 spans for each of 8 KV heads are a round of 264 slots; keys come by the least span.
  EXPECT_EQ(decode_span_len(131072, 4, 8, 264), 4096);
  EXPECT_EQ(decode_span_len(137000, 4, 8, 264), 4352);
  EXPECT_EQ(decode_span_len(131072, 16, 8, 264), 8192);   // two runs of pairs: 16 spans each
  EXPECT_EQ(decode_span_len(131072, 4, 8, 216), 4864);    // 27 spans
  EXPECT_EQ(decode_span_len(131072, 4, 1, 264), 2048);    // 64, the most
  EXPECT_EQ(decode_span_len(131072, 1, 32, 264), 16384);  // 8
  EXPECT_EQ(decode_span_len(131072, 1, 150, 264),
            26368);  // 5 in 3 rounds: 1 in one leaves 114 slots
  EXPECT_EQ(decode_span_len(300, 4, 8, 264), kMinDecodeSpan);
}

TEST(DecodeSpans, SharesDealtInTurnDifferByOneSpanAtMost) {
  const DecodeSpans work(random_seqs(7, 1, 1000000), 32, 8, kSlots);
  for (const size_t blocks : {7, 132, 264}) {
    std::vector<int64_t> keys(blocks);
    for (size_t i = 0; i < work.spans().size(); ++i) {
      keys[i % blocks] += work.spans()[i].num_keys;
    }
    const auto [least, most] = std::minmax_element(keys.begin(), keys.end());
    EXPECT_LE(*most - *least, work.spans()[0].num_keys);
  }
}

TEST(PrefillTiles, CoverEveryRowOfEveryHeadOnceMostKeysFirst) {
  const std::vector<PrefillSeq> seqs{{0, 1000, 500}, {2, 1, 0}, {5, 128, 70000}, {6, 129, 3}};
  std::vector<PrefillTile> tiles;
  append_prefill_tiles(seqs, 6, &tiles);
  std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
  int64_t before = INT64_MAX;
  for (const PrefillTile& tile : tiles) {
    EXPECT_TRUE(seen.emplace(tile.seq, tile.head, tile.row).second);
    const auto seq = std::find_if(seqs.begin(), seqs.end(),
                                  [&](const PrefillSeq& s) { return s.seq == tile.seq; });
    ASSERT_NE(seq, seqs.end());
    EXPECT_EQ(tile.row % kPrefillRows, 0);
    EXPECT_LT(tile.row, seq->num_rows);
    const int64_t keys = seq->first_position + std::min(tile.row + kPrefillRows, seq->num_rows);
    EXPECT_LE(keys, before);
    before = keys;
  }
  EXPECT_EQ(seen.size(), 6 * (8 + 1 + 1 + 2));
}

TEST(PrefillTiles, RowsThatSeeNoKeyOfTheRankAreLeftOut) {
  // Of every 512 tokens in a row the rank has the second 256.
  const PrefillSeq seq{0, 700, 0, {256, 1, 2}};
  EXPECT_EQ(seq.keys(256), 0);
  EXPECT_EQ(seq.keys(300), 44);
  EXPECT_EQ(seq.keys(700), 256);
  std::vector<PrefillTile> tiles;
  append_prefill_tiles({&seq, 1}, 1, &tiles);
  std::set<int32_t> rows;
  for (const PrefillTile& tile : tiles) rows.insert(tile.row);
  EXPECT_EQ(rows, (std::set<int32_t>{256, 384, 512, 640}));
}

TEST(PrefillPasses, TakeEverySequenceOnceWithinTheWorkspace) {
  for (const int32_t kv_heads : {1, 3, 8, 12}) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      std::vector<PrefillSeq> seqs;
      int64_t longest = 0;
      for (const DecodeSeq& seq : random_seqs(seed, 9000, 300000)) {
        seqs.push_back({seq.seq, seq.num_rows, seq.num_keys - seq.num_rows});
        longest = std::max(longest, seq.num_keys);
      }
      const auto count = static_cast<int64_t>(seqs.size());
      const int64_t capacity = workspace_panels(longest, count, kv_heads);
      EXPECT_GE(capacity, (longest + 63) / 64);
      int32_t next = 0;
      for (const PrefillPass& pass : plan_prefill_passes(seqs, kv_heads, capacity)) {
        EXPECT_EQ(pass.first_seq, next);
        EXPECT_GT(pass.num_seqs, 0);
        int64_t panels = 0;
        for (int32_t i = 0; i < pass.num_seqs; ++i, ++next) {
          const PrefillSeq& seq = seqs[static_cast<size_t>(next)];
          panels += (seq.first_position + seq.num_rows + 63) / 64;
        }
        EXPECT_EQ(pass.num_panels, panels);
        EXPECT_EQ(kv_heads % pass.num_kv_heads, 0);
        EXPECT_LE(panels * pass.num_kv_heads, capacity);
        for (int32_t more = pass.num_kv_heads + 1; more <= kv_heads; ++more) {
          EXPECT_TRUE(kv_heads % more != 0 || panels * more > capacity) << more << " would fit";
        }
      }
      EXPECT_EQ(next, count);
    }
  }
}

TEST(PrefillPasses, OccupyAllMultiprocessorsByTheRowsOfARound) {
  constexpr int64_t kKeys = 1000000;
  for (const auto& [heads, kv_heads] : {std::pair{32, 8}, {16, 4}, {9, 3}, {200, 1}}) {
    for (const bool has_workspace : {false, true}) {
      const int64_t rows = rows_of_a_round(has_workspace, heads, kv_heads, 132);
      const std::vector<PrefillSeq> seqs{{0, static_cast<int32_t>(rows), kKeys - rows}};
      const int64_t capacity = has_workspace ? workspace_panels(kKeys, 1, kv_heads) : 0;
      const PrefillPass pass = plan_prefill_passes(seqs, kv_heads, capacity).at(0);
      const int64_t of_pass = heads / kv_heads * pass.num_kv_heads;
      const int64_t tiles = rows / kPrefillRows * of_pass;
      EXPECT_GT(tiles, 132 - of_pass) << heads << " heads";
      EXPECT_LE(tiles, std::max<int64_t>(132, of_pass)) << heads << " heads";
    }
  }
}

TEST(PrefillPasses, ReadACacheInBfloat16InOne) {
  const std::vector<PrefillSeq> seqs{{0, 1000, 500}, {2, 17, 0}};
  const std::vector<PrefillPass> passes = plan_prefill_passes(seqs, 8, 0);
  ASSERT_EQ(passes.size(), 1);
  EXPECT_EQ(passes[0].num_seqs, 2);
  EXPECT_EQ(passes[0].num_kv_heads, 8);
  EXPECT_TRUE(plan_prefill_passes({}, 8, 0).empty());
}

}  // namespace
}  // namespace longspan::cuda
