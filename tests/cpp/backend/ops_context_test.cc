#include <algorithm>
#include <vector>

#include "backend/attention_ops.h"

namespace longspan {
namespace {

using reference::Matrix;

/// Ranks that share the keys of every sequence: what they have together is attention over all.
class ContextOps : public AttentionOps {};
LONGSPAN_TEST_DEVICES(ContextOps);

TEST(ContextShard, SharesOutEveryTokenInOrder) {
  for (const int32_t size : {1, 2, 3, 4}) {
    std::vector<int64_t> keys(static_cast<size_t>(size));  // of each, so far
    for (int64_t position = 0; position < 3000; ++position) {
      const int64_t owner = position / 64 % size;
      for (int32_t rank = 0; rank < size; ++rank) {
        const ContextShard shard{64, rank, size};
        ASSERT_EQ(shard.has(position), rank == owner);
        ASSERT_EQ(shard.keys(position), keys[static_cast<size_t>(rank)]) << position;
      }
      ++keys[static_cast<size_t>(owner)];
    }
  }
}

TEST_P(ContextOps, PrefillsAtEveryEdgeOfBlocks) {
  for (const int32_t size : {2, 4}) {
    share_context(size);
    for (const int64_t length : {1, 63, 64, 65, 128, 129, 300}) {
      SCOPED_TRACE(testing::Message() << size << ", " << length);
      make_cache({3, 1, 64}, 64, 200, 320, 1);
      poison();
      const int64_t seq = add_sequence(length, 1e4, 1.0, 2);
      expect_attention(prefill(seq, length, 170), 0, seq, 0, length);
    }
  }
}

TEST_P(ContextOps, ReadsEveryFormat) {
  for (const KvFormat format : backend().kv_formats(128)) {
    SCOPED_TRACE(name_of(format));
    share_context(2);
    make_cache({4, 2, 128}, 64, 300, 320, 1, format);
    poison();
    const int64_t seq = add_sequence(261, 1e4, 1.0, 2);
    expect_attention(step({{seq, 0, 260}}), 0, seq, 0, 260);
    expect_attention(step({{seq, 260, 1}}), 0, seq, 260, 1);
  }
}

TEST_P(ContextOps, EqualsTheDefinitionForManyShapes) {
  const AttentionShape shapes[] = {{9, 3, 64}, {8, 1, 128}, {8, 2, 128}, {2, 2, 96}};
  int64_t block_len = 64;
  for (const AttentionShape& shape : shapes) {
    SCOPED_TRACE(testing::Message() << shape.num_heads << "/" << shape.num_kv_heads << " x "
                                    << shape.head_dim << ", blocks of " << block_len);
    share_context(3);
    make_cache(shape, block_len, 400, 700, 1);
    poison();
    const int64_t seq = add_sequence(700, 1e4, 1.1, 1);
    step({{seq, 0, 400}});
    expect_attention(step({{seq, 400, 299}}), 0, seq, 400, 299);
    expect_attention(step({{seq, 699, 1}}), 0, seq, 699, 1);
    block_len = block_len == 256 ? 64 : 2 * block_len;
  }
}

TEST_P(ContextOps, DecodesInPoisonedBlocks) {
  for (const int32_t size : {2, 4}) {
    SCOPED_TRACE(size);
    share_context(size);
    make_cache({4, 2, 64}, 64, 512, 4480, 1);  // more than a span of keys to a rank
    poison();
    const int64_t seq = add_sequence(4420, 1e4, 1.0, 3);
    int64_t first = 0;
    for (const int64_t until : {5, 70, 1100, 4420}) {
      for (; first + 3 < until; first += std::min<int64_t>(512, until - 3 - first)) {
        step({{seq, first, std::min<int64_t>(512, until - 3 - first)}}, false);
      }
      for (; first < until; ++first) {
        expect_attention(step({{seq, first, 1}}), 0, seq, first, 1);
      }
    }
  }
}

TEST_P(ContextOps, MixesSequencesOfAnyLengthAndProfileInAStep) {
  share_context(2);
  make_cache({6, 2, 64}, 128, 256, 800, 4);
  poison();
  const int64_t a = add_sequence(700, 1e4, 1.0, 3);
  const int64_t b = add_sequence(200, 5e5, 1.2, 4);
  const int64_t c = add_sequence(77, 100.0, 0.8, 5);
  for (int64_t first = 0; first < 600; first += 200) step({{a, first, 200}});
  step({{b, 0, 100}, {a, 600, 99}});
  const Matrix out = step({{a, 699, 1}, {c, 0, 77}, {b, 100, 100}});
  expect_attention(out, 0, a, 699, 1);
  expect_attention(out, 1, c, 0, 77);
  expect_attention(out, 78, b, 100, 100);
}

TEST_P(ContextOps, GoesOnFromACopiedBlock) {
  share_context(2);
  for (const int64_t shared : {1, 64, 65, 127}) {
    SCOPED_TRACE(shared);
    make_cache({2, 2, 128}, 64, 300, 300, 2);
    poison();
    const int64_t source = add_sequence(128, 1e4, 1.0, 6);
    const int64_t target = add_sequence(170, 1e4, 1.0, 6);  // begins as the source does
    spoil(source, shared);
    step({{source, 0, 128}}, false);
    copy_first_block(source, target, shared);
    expect_attention(step({{target, shared, 170 - shared}}), 0, target, shared, 170 - shared);
  }
}

}  // namespace
}  // namespace longspan
