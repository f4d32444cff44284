#include <algorithm>
#include <memory>
#include <vector>

#include "backend/attention_ops.h"

namespace longspan {
namespace {

using reference::Matrix;

LONGSPAN_TEST_DEVICES(AttentionOps);

TEST_P(AttentionOps, EqualsTheDefinitionForManyShapes) {
  const AttentionShape shapes[] = {{1, 1, 64},  {4, 2, 64}, {9, 3, 64},   {10, 2, 80},
                                   {8, 1, 128}, {6, 6, 96}, {16, 2, 128}, {4, 2, 256}};
  int64_t block_len = 64;
  for (const AttentionShape& shape : shapes) {
    for (const KvFormat format : backend().kv_formats(shape.head_dim)) {
      SCOPED_TRACE(testing::Message()
                   << shape.num_heads << "/" << shape.num_kv_heads << " x " << shape.head_dim
                   << ", blocks of " << block_len << ", " << name_of(format));
      make_cache(shape, block_len, 100, 300, 1, format);
      const int64_t seq = add_sequence(150, 1e4, 1.0, 1);
      expect_attention(prefill(seq, 150, 100), 0, seq, 0, 150);
    }
    block_len = block_len == 256 ? 64 : 2 * block_len;
  }
}

TEST_P(AttentionOps, EqualsTheDefinitionAtEveryEdgeOfPanels) {
  for (const KvFormat format : backend().kv_formats(64)) {
    for (const int64_t length : {1, 2, 63, 64, 65, 127, 128, 129, 1025, 2100}) {
      SCOPED_TRACE(testing::Message() << length << ", " << name_of(format));
      make_cache({6, 2, 64}, 64, 512, 2112, 1, format);
      const int64_t seq = add_sequence(length, 1e4, 1.0, 2);
      const Matrix all = prefill(seq, length, 512);
      const int64_t first = std::max<int64_t>(0, length - 70);
      expect_attention(all, first, seq, first, length - first);
    }
  }
}

TEST_P(AttentionOps, StepsOfOneShapeAreRepeated) {
  make_cache({8, 2, 64}, 64, 512, 1088, 3);
  // Tables of different lengths, one span of keys and several, profiles that come and go.
  std::vector<int64_t> lengths = {250, 1020, 1, 60};
  for (size_t s = 0; s < lengths.size(); ++s) {
    const int64_t seq = add_sequence(s == 1 ? 1040 : 300, s == 2 ? 1e6 : 1e4, 1.0, s + 3);
    prefill(seq, lengths[s], 512);
  }
  Repeated three(*this, 3);
  Repeated two(*this, 2);
  const auto decode = [&](Repeated& repeated, const std::vector<int64_t>& seqs) {
    std::vector<Piece> runs;
    for (const int64_t seq : seqs) runs.push_back({seq, lengths[static_cast<size_t>(seq)]++, 1});
    const Matrix result = repeated.step(runs);
    for (size_t r = 0; r < runs.size(); ++r) {
      expect_attention(result, static_cast<int64_t>(r), runs[r].seq, runs[r].first, 1);
    }
  };
  for (int t = 0; t < 4; ++t) {
    SCOPED_TRACE(t);
    decode(three, {0, 1, 2});
    decode(three, {3, 0, 1});
    decode(two, {1, 2});
    decode(two, {0, 3});
  }
}

TEST_P(AttentionOps, DecodesInPoisonedBlocks) {
  for (const KvFormat format : backend().kv_formats(128)) {
    for (const int64_t block_len : {64, 256}) {
      if (block_len == 256 && format != KvFormat::kNative) continue;  // takes its time
      SCOPED_TRACE(testing::Message() << block_len << ", " << name_of(format));
      make_cache({8, 2, 128}, block_len, 512, 2304, 2, format);
      poison();
      const int64_t seq = add_sequence(2200, 1e4, 1.0, 3);
      int64_t first = 0;
      for (const int64_t until : {5, 70, 1100, 2200}) {
        for (; first + 12 < until; first += std::min<int64_t>(512, until - 12 - first)) {
          step({{seq, first, std::min<int64_t>(512, until - 12 - first)}});
        }
        for (; first < until; ++first) {
          expect_attention(step({{seq, first, 1}}), 0, seq, first, 1);
        }
      }
    }
  }
}

TEST_P(AttentionOps, GoesOnFromACopiedBlockWhateverFollowedInIt) {
  for (const KvFormat format : backend().kv_formats(128)) {
    for (const int64_t block_len : {64, 256}) {
      for (const int64_t shared : {int64_t{1}, int64_t{33}, block_len / 2, block_len - 1}) {
        SCOPED_TRACE(testing::Message()
                     << shared << " of a block of " << block_len << ", " << name_of(format));
        make_cache({2, 2, 128}, block_len, 300, 300, 2, format);
        poison();
        const int64_t length = block_len + 30;
        const int64_t source = add_sequence(block_len, 1e4, 1.0, 6);
        const int64_t target = add_sequence(length, 1e4, 1.0, 6);  // begins as the source does
        spoil(source, shared);
        step({{source, 0, block_len}}, false);
        copy_first_block(source, target, shared);
        expect_attention(step({{target, shared, 1}}), 0, target, shared, 1);
        const int64_t left = length - shared - 1;
        expect_attention(step({{target, shared + 1, left}}), 0, target, shared + 1, left);
      }
    }
  }
}

TEST_P(AttentionOps, MixesSequencesOfAnyLengthAndProfileInAStep) {
  for (const KvFormat format : backend().kv_formats(64)) {
    SCOPED_TRACE(name_of(format));
    make_cache({9, 3, 64}, 128, 256, 1500, 4, format);
    poison();
    const int64_t a = add_sequence(1300, 1e4, 1.0, 3);
    const int64_t b = add_sequence(200, 5e5, 1.2, 4);
    const int64_t c = add_sequence(77, 100.0, 0.8, 5);
    for (int64_t first = 0; first < 1200; first += 240) step({{a, first, 240}});
    step({{b, 0, 100}, {a, 1200, 99}});
    const Matrix out = step({{a, 1299, 1}, {c, 0, 77}, {b, 100, 100}});
    expect_attention(out, 0, a, 1299, 1);
    expect_attention(out, 1, c, 0, 77);
    expect_attention(out, 78, b, 100, 100);
  }
}

TEST_P(AttentionOps, RotatesInPartUnderAnAttentionFactor) {
  for (const auto& [head_dim, rotary_dim] : {std::pair{64, 32}, {128, 96}, {96, 20}}) {
    for (const KvFormat format : backend().kv_formats(head_dim)) {
      SCOPED_TRACE(testing::Message()
                   << rotary_dim << " of " << head_dim << ", " << name_of(format));
      make_cache({4, 2, head_dim}, 64, 512, 320, 2, format);
      rotate_in_part(rotary_dim);
      const int64_t a = add_sequence(300, 1e4, 1.3, 6);
      const int64_t b = add_sequence(120, 1e4, 0.8, 7);
      step({{b, 0, 119}});
      const Matrix out = step({{b, 119, 1}, {a, 0, 300}});
      expect_attention(out, 0, b, 119, 1);
      expect_attention(out, 1, a, 0, 300);
    }
  }
}

TEST_P(AttentionOps, NormsTheHeadsOfQueriesAndKeys) {
  for (const AttentionShape& shape : {AttentionShape{4, 2, 128}, {9, 3, 64}, {2, 1, 24}}) {
    SCOPED_TRACE(shape.head_dim);
    make_cache(shape, 64, 512, 320, 1);
    norm_heads();
    const int64_t seq = add_sequence(300, 1e4, 1.0, 8);
    expect_attention(step({{seq, 0, 299}}), 0, seq, 0, 299);
    expect_attention(step({{seq, 299, 1}}), 0, seq, 299, 1);
  }
}

TEST_P(AttentionOps, DecodesManySequencesInAStep) {
  constexpr int64_t kSeqs = 40;
  for (const KvFormat format : backend().kv_formats(128)) {
    SCOPED_TRACE(name_of(format));
    make_cache({4, 1, 128}, 64, 512, 320, kSeqs, format);
    poison();
    std::vector<Piece> last;
    for (int64_t s = 0; s < kSeqs; ++s) {
      const int64_t length = 1 + s * 7;
      const int64_t seq = add_sequence(length, 1e4, 1.0, static_cast<uint64_t>(s));
      if (length > 1) step({{seq, 0, length - 1}}, false);
      last.push_back({seq, length - 1, 1});
    }
    const Matrix out = step(last);
    for (int64_t s = 0; s < kSeqs; ++s) expect_attention(out, s, s, s * 7, 1);
  }
}

TEST_P(AttentionOps, FormsTheProductsOfManyRowsInEveryWay) {
  const AttentionShape shapes[] = {{8, 2, 128}, {3, 3, 128}, {8, 8, 128}, {4, 2, 64}};
  int64_t block_len = 64;
  for (const AttentionShape& shape : shapes) {
    for (const PrefillAttention attention : backend().prefill_attentions(shape.head_dim)) {
      SCOPED_TRACE(testing::Message()
                   << name_of(attention) << ", " << shape.num_heads << "/" << shape.num_kv_heads
                   << " x " << shape.head_dim << ", blocks of " << block_len);
      multiply_in(attention);
      make_cache(shape, block_len, 800, 1000, 3);
      poison();
      const int64_t a = add_sequence(260, 1e4, 1.0, 1);
      const int64_t b = add_sequence(1000, 1e4, 1.1, 2);
      const int64_t c = add_sequence(64, 1e4, 1.0, 3);
      expect_attention(step({{b, 0, 700}}), 0, b, 0, 700);
      step({{a, 0, 1}});
      const Matrix out = step({{c, 0, 64}, {b, 700, 40}, {a, 1, 129}});
      expect_attention(out, 0, c, 0, 64);
      expect_attention(out, 64, b, 700, 40);
      expect_attention(out, 104, a, 1, 129);
      expect_attention(step({{b, 740, 1}}), 0, b, 740, 1);
    }
    block_len = block_len == 256 ? 64 : 2 * block_len;
  }
}

/// Whoever goes through keys from the last one on, and remembers the largest score so far, meets
/// the loudest keys at the end: by 2^200 without their own maximum.
TEST_P(AttentionOps, FindsTheLoudestKeysWhereverTheyAre) {
  const AttentionShape shape{4, 2, 128};
  for (const PrefillAttention attention : backend().prefill_attentions(shape.head_dim)) {
    SCOPED_TRACE(name_of(attention));
    multiply_in(attention);
    make_cache(shape, 64, 300, 300, 1);
    const int64_t seq = add_sequence(300, 1e4, 1.0, 4);
    raise_keys(seq, 60, 16.0);
    expect_attention(step({{seq, 0, 300}}), 0, seq, 0, 300);
  }
}

}  // namespace
}  // namespace longspan
