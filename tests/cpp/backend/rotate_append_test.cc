#include <gtest/gtest.h>

#include "backend/attention_harness.h"
#include "backend/kernel_case.h"

namespace longspan::cpu {
namespace {

/// Values are below 8: float32 rounds three times, bfloat16 once more, to half a unit of 2^-5.
double tolerance(DType dtype) { return dtype == DType::kF32 ? 2e-6 : 0x1p-6 + 2e-6; }

class RotateAppend : public testing::TestWithParam<KernelCase> {
 protected:
  double element(const char* tile, int64_t index) const {
    return GetParam().dtype == DType::kF32
               ? reinterpret_cast<const float*>(tile)[index]
               : reference::bf16_value(reinterpret_cast<const uint16_t*>(tile)[index]);
  }
  template <class T>
  static int64_t packed(int64_t k, int64_t n, int64_t rows) {
    return n / kPanelCols * padded_k<T>(rows) * kPanelCols + index_in_panel<T>(k, n);
  }
  /// Element (k, n) of a packed B with `rows` rows.
  double packed_element(const char* tile, int64_t k, int64_t n, int64_t rows) const {
    return element(tile, GetParam().dtype == DType::kF32 ? packed<float>(k, n, rows)
                                                         : packed<bf16_t>(k, n, rows));
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotateAppend, testing::ValuesIn(kernel_cases()), kernel_case_name);

TEST_P(RotateAppend, WritesEveryKeyAndValueWhereTheTilesHaveThem) {
  for (const int64_t head_dim : {2, 8, 20, 64, 80, 128}) {
    for (const int64_t block_len : {64, 128, 256}) {
      SCOPED_TRACE(testing::Message() << "head_dim " << head_dim << ", blocks of " << block_len);
      const AttentionShape shape{4, 2, head_dim};
      AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, block_len, 2, 100,
                               300);
      harness.poison();
      const int64_t length = 150;
      const int64_t seq = harness.add_sequence(length, 10000.0, 1.0, 1);
      const TestSequence& sequence = harness.sequence(seq);
      const int64_t chunks[] = {1, 2, 60, 1, 1, 64, 21};
      int64_t first = 0;
      for (const int64_t count : chunks) {
        harness.step({{seq, first, count}}, false);
        first += count;
      }
      ASSERT_EQ(first, length);

      std::vector<int64_t> positions(static_cast<size_t>(length));
      std::iota(positions.begin(), positions.end(), 0);
      const reference::Matrix rotated =
          reference::rotate(sequence.qkv, head_dim, positions, sequence.profile->inv_freq);
      const KvCache& cache = harness.cache();
      const KvTiles tiles(cache.shape, GetParam().dtype);
      const int64_t k_col = harness.q_cols();
      const int64_t v_col = k_col + harness.kv_cols();
      double worst = 0;
      double worst_v = 0;
      for (int64_t p = 0; p < length; ++p) {
        for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
          const int32_t* table = sequence.block_table.data();
          const char* pool = cache.pool.as<char>();
          const char* k = pool + tiles.k_offset(table, p / 64, AttentionHarness::kLayer, head);
          const char* v = pool + tiles.v_offset(table, p / 64, AttentionHarness::kLayer, head);
          for (int64_t d = 0; d < head_dim; ++d) {
            const int64_t col = head * head_dim + d;
            const double key = packed_element(k, d, p % 64, head_dim);
            const double value = packed_element(v, p % 64, d, 64);
            const reference::Matrix& qkv = sequence.qkv;
            worst = std::max(worst, std::abs(key - rotated.at(p, k_col + col)));
            reference::Matrix exact(1, 1);
            exact.at(0, 0) = qkv.at(p, v_col + col);
            worst_v = std::max(worst_v, std::abs(value - harness.rounded(exact).at(0, 0)));
            ASSERT_TRUE(std::isfinite(key) && std::isfinite(value));
          }
        }
      }
      EXPECT_LE(worst, tolerance(GetParam().dtype));
      EXPECT_EQ(worst_v, 0);

      // Keys of the last tile not yet appended have values of zero.
      const char* last =
          cache.pool.as<char>() + tiles.v_offset(sequence.block_table.data(), (length - 1) / 64,
                                                 AttentionHarness::kLayer, 1);
      for (int64_t n = length % 64; n < 64; ++n) {
        for (int64_t d = 0; d < head_dim; ++d) ASSERT_EQ(packed_element(last, n, d, 64), 0);
      }
    }
  }
}

TEST_P(RotateAppend, RotatesQueriesByAnglesInDoublePrecisionFarOut) {
  const AttentionShape shape{6, 2, 64};
  AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, 256, 2, 100, 1'100'000,
                           1);
  const int64_t length = 100;
  const int64_t start = 1'048'576 - 17;
  const int64_t seq = harness.add_far_sequence(start, length, 5e7, 1);
  harness.step({{seq, start, length}}, false);
  const TestSequence& sequence = harness.sequence(seq);
  std::vector<int64_t> positions(static_cast<size_t>(length));
  std::iota(positions.begin(), positions.end(), start);
  const reference::Matrix rotated =
      reference::rotate(sequence.qkv, 64, positions, sequence.profile->inv_freq);
  double worst = 0;
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t c = 0; c < harness.q_cols(); ++c) {
      worst = std::max(worst, std::abs(harness.last_q().at(t, c) - rotated.at(t, c)));
    }
  }
  EXPECT_LE(worst, tolerance(GetParam().dtype));
}

/// Keys and queries of a head of which a part rotates, at every place in the vectors of 16.
TEST_P(RotateAppend, LeavesTheDimsBehindThePairsAsTheyAre) {
  for (const int64_t head_dim : {20, 64, 128}) {
    for (const int64_t pairs : {int64_t{1}, head_dim / 8, head_dim / 2 - 1, head_dim / 2}) {
      SCOPED_TRACE(testing::Message() << pairs << " pairs of head_dim " << head_dim);
      const AttentionShape shape{4, 2, head_dim};
      AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, 64, 2, 70, 100, 1);
      const int64_t seq = harness.add_sequence(70, 10000.0, 1.0, 3);
      harness.profile(seq).inv_freq.resize(static_cast<size_t>(pairs));
      harness.step({{seq, 0, 69}}, false);
      harness.step({{seq, 69, 1}}, false);
      const TestSequence& sequence = harness.sequence(seq);
      std::vector<int64_t> positions(70);
      std::iota(positions.begin(), positions.end(), 0);
      const reference::Matrix rotated =
          reference::rotate(sequence.qkv, head_dim, positions, sequence.profile->inv_freq);
      const KvTiles tiles(harness.cache().shape, GetParam().dtype);
      double worst = 0;
      for (int64_t p = 0; p < 70; ++p) {
        for (int64_t c = 0; c < harness.kv_cols(); ++c) {
          const char* tile = harness.cache().pool.as<char>() +
                             tiles.k_offset(sequence.block_table.data(), p / 64,
                                            AttentionHarness::kLayer, c / head_dim);
          const double key = packed_element(tile, c % head_dim, p % 64, head_dim);
          worst = std::max(worst, std::abs(key - rotated.at(p, harness.q_cols() + c)));
        }
      }
      for (int64_t c = 0; c < harness.q_cols(); ++c) {
        worst = std::max(worst, std::abs(harness.last_q().at(0, c) - rotated.at(69, c)));
      }
      EXPECT_LE(worst, tolerance(GetParam().dtype));
    }
  }
}

/// Log-n attention: queries past its length grow, those within it are the same bits as without.
TEST_P(RotateAppend, ScalesQueriesByLogN) {
  const AttentionShape shape{4, 2, 64};
  AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, 64, 2, 100, 300, 2);
  const int64_t plain = harness.add_sequence(100, 10000.0, 1.0, 5);
  harness.step({{plain, 0, 100}}, false);
  const reference::Matrix unscaled = harness.last_q();
  const int64_t seq = harness.add_sequence(100, 10000.0, 1.0, 5);
  harness.profile(seq).logn_length = 40;
  harness.step({{seq, 0, 30}}, false);
  harness.step({{seq, 30, 70}, {plain, 0, 30}}, false);
  const TestSequence& sequence = harness.sequence(seq);
  std::vector<int64_t> positions(100);
  std::iota(positions.begin(), positions.end(), 0);
  const reference::Matrix expected = reference::scale_queries(
      reference::rotate(sequence.qkv, 64, positions, sequence.profile->inv_freq), positions, 40);
  const double allowed = std::log(100) / std::log(40) * tolerance(GetParam().dtype);
  for (int64_t t = 0; t < 100; ++t) {
    for (int64_t c = 0; c < harness.q_cols(); ++c) {
      const double got = harness.last_q().at(t, c);
      if (t >= 70) {
        ASSERT_EQ(got, unscaled.at(t - 70, c)) << "of another sequence";
      } else if (t + 30 < 40) {
        ASSERT_EQ(got, unscaled.at(t + 30, c));
      } else {
        ASSERT_NEAR(got, expected.at(t + 30, c), allowed) << "position " << t + 30;
      }
    }
  }
  EXPECT_GT(std::abs(expected.at(99, 0) / unscaled.at(99, 0)), 1.2);
}

/// Qwen 3's norm: each head of q by one weight, each of k by another, before they are rotated.
TEST_P(RotateAppend, NormsEachHeadBeforeRotating) {
  const auto weight_of = [](const reference::Matrix& values) {
    Buffer buffer = allocate_host(values.cols * 4);
    reference::write(values, {buffer.data(), DType::kF32, 1, values.cols, values.cols});
    return buffer;
  };
  for (const int64_t head_dim : {8, 20, 64, 128}) {
    SCOPED_TRACE(testing::Message() << "head_dim " << head_dim);
    constexpr double kEps = 0.25;  // large enough to be missed
    const AttentionShape shape{4, 2, head_dim};
    AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, 64, 2, 100, 300);
    const reference::Matrix q_weight = reference::random_matrix(1, head_dim, 2.0, 8);
    const reference::Matrix k_weight = reference::random_matrix(1, head_dim, 2.0, 9);
    const Buffer q_norm = weight_of(q_weight);
    const Buffer k_norm = weight_of(k_weight);
    harness.set_norm(q_norm, k_norm, kEps);
    const int64_t length = 70;
    const int64_t seq = harness.add_sequence(length, 10000.0, 1.0, 1);
    harness.step({{seq, 0, length}}, false);
    const TestSequence& sequence = harness.sequence(seq);

    reference::Matrix normed = sequence.qkv;
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t col = 0; col < harness.q_cols() + harness.kv_cols(); col += head_dim) {
        reference::Matrix head(1, head_dim);
        for (int64_t d = 0; d < head_dim; ++d) head.at(0, d) = normed.at(t, col + d);
        head =
            reference::rms_norm(head, (col < harness.q_cols() ? q_weight : k_weight).row(0), kEps);
        for (int64_t d = 0; d < head_dim; ++d) normed.at(t, col + d) = head.at(0, d);
      }
    }
    std::vector<int64_t> positions(static_cast<size_t>(length));
    std::iota(positions.begin(), positions.end(), 0);
    const reference::Matrix rotated =
        reference::rotate(normed, head_dim, positions, sequence.profile->inv_freq);
    const KvTiles tiles(harness.cache().shape, GetParam().dtype);
    double worst = 0;
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t c = 0; c < harness.q_cols(); ++c) {
        worst = std::max(worst, std::abs(harness.last_q().at(t, c) - rotated.at(t, c)));
      }
      for (int64_t c = 0; c < harness.kv_cols(); ++c) {
        const char* tile = harness.cache().pool.as<char>() +
                           tiles.k_offset(sequence.block_table.data(), t / 64,
                                          AttentionHarness::kLayer, c / head_dim);
        const double key = packed_element(tile, c % head_dim, t % 64, head_dim);
        worst = std::max(worst, std::abs(key - rotated.at(t, harness.q_cols() + c)));
      }
    }
    EXPECT_LE(worst, tolerance(GetParam().dtype));
  }
}

}  // namespace
}  // namespace longspan::cpu
