#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "backend/cpu/sample.h"
#include "backend/device.h"

namespace longspan {
namespace {

using reference::Matrix;

constexpr double kInf = std::numeric_limits<double>::infinity();

class SampleOps : public Ops {
 protected:
  std::vector<int32_t> sample(const Matrix& logits, std::vector<SamplerRow> rows) const {
    const DeviceMatrix on_device = matrix(acc(), logits);
    std::vector<int32_t> tokens(rows.size(), -2);
    backend().sampled(backend().start_sample(on_device.view(), rows), tokens);
    EXPECT_TRUE(same(on_device.read(), logits)) << "sampling changed the logits";
    return tokens;
  }

  /// Equal, where a NaN equals a NaN.
  static bool same(const Matrix& a, const Matrix& b) {
    return std::ranges::equal(a.values, b.values, [](double x, double y) {
      return x == y || (std::isnan(x) && std::isnan(y));
    });
  }
};
LONGSPAN_TEST_DEVICES(SampleOps);

SamplerRow settings(float temperature, int32_t top_k, float top_p, float min_p = 0) {
  SamplerRow row;
  row.greedy = false;
  row.temperature = temperature;
  row.top_k = top_k;
  row.top_p = top_p;
  row.min_p = min_p;
  return row;
}

/// Logits in a bell of a standard deviation of `width`, exact in float32.
Matrix bell(int64_t rows, int64_t cols, double width, uint64_t seed) {
  Matrix logits(rows, cols);
  constexpr int64_t kSummed = 4;
  const Matrix uniform = reference::random_matrix(rows * kSummed, cols, width * 0.87, seed);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      double sum = 0;  // of uniform numbers: nearly normal
      for (int64_t i = 0; i < kSummed; ++i) sum += uniform.at(r * kSummed + i, c);
      logits.at(r, c) = static_cast<float>(sum);
    }
  }
  return logits;
}

TEST_P(SampleOps, GreedyTakesTheFirstLargest) {
  for (const int64_t vocabulary : {1, 2, 31, 32, 33, 1023, 1025, 49152}) {
    Matrix logits = reference::random_matrix(3, vocabulary, 5.0, 1);
    for (int64_t c = vocabulary / 3; c < vocabulary; c += 2) logits.at(1, c) = 6.0;
    std::vector<int32_t> expected;
    for (int64_t r = 0; r < 3; ++r) {
      const auto row = logits.row(r);
      expected.push_back(static_cast<int32_t>(std::ranges::max_element(row) - row.begin()));
    }
    EXPECT_EQ(sample(logits, std::vector<SamplerRow>(3)), expected) << vocabulary;
  }
  Matrix zeros(1, 3);
  zeros.values = {-3.0, -0.0, 0.0};  // equal
  EXPECT_EQ(sample(zeros, {{}}), std::vector<int32_t>{1});
}

TEST_P(SampleOps, RowsThatAreNotFiniteGiveMinusOneAndHarmNoOther) {
  for (const SamplerRow& row : {SamplerRow{}, settings(1, 0, 1), settings(1, 5, 0.5f)}) {
    Matrix logits = reference::random_matrix(6, 100, 1.0, 1);
    for (int64_t r = 1; r < 6; ++r) {
      for (int64_t c = 0; c < 100; ++c) logits.at(r, c) = logits.at(0, c);
    }
    logits.at(1, 0) = std::numeric_limits<double>::quiet_NaN();
    logits.at(2, 99) = -std::numeric_limits<double>::quiet_NaN();
    logits.at(4, 50) = kInf;
    for (int64_t c = 0; c < 100; ++c) logits.at(5, c) = -kInf;
    const std::vector<int32_t> tokens = sample(logits, std::vector<SamplerRow>(6, row));
    EXPECT_GE(tokens[0], 0);
    EXPECT_EQ(tokens, (std::vector<int32_t>{tokens[0], -1, -1, tokens[0], -1, -1}));
  }
}

/// Draws of one row: the tokens must come as often as the reference says, none of probability 0.
TEST_P(SampleOps, DrawsFromTheReferenceDistribution) {
  constexpr int kDraws = 4000;
  const Matrix wide = bell(1, 301, 2.0, 11);
  Matrix tied = bell(1, 301, 1.5, 12);
  for (double& x : tied.values) x = std::round(x);
  Matrix holes = wide;
  for (size_t i = 0; i < holes.values.size(); i += 3) holes.values[i] = -kInf;
  for (const Matrix& logits : {wide, tied, holes}) {
    for (const SamplerRow& row :
         {settings(1, 0, 1), settings(2.5f, 0, 1), settings(0.3f, 0, 1), settings(1, 40, 1),
          settings(1, 0, 0.7f), settings(0.8f, 50, 0.8f), settings(1, 7, 0.9f),
          settings(1, 0, 1, 0.1f), settings(1.5f, 20, 0.95f, 0.2f)}) {
      SCOPED_TRACE(testing::Message() << "temperature " << row.temperature << " top_k " << row.top_k
                                      << " top_p " << row.top_p << " min_p " << row.min_p);
      const std::vector<double> expected = reference::sampler_probabilities(
          logits.values, {row.temperature, row.top_k, row.top_p, row.min_p, {}});
      Matrix all(kDraws, logits.cols);
      for (int64_t r = 0; r < all.rows; ++r) {
        std::ranges::copy(logits.values, all.values.begin() + r * all.cols);
      }
      std::vector<SamplerRow> rows(kDraws, row);
      for (size_t i = 0; i < rows.size(); ++i) rows[i].position = static_cast<int64_t>(i);
      std::vector<int> seen(logits.values.size());
      for (const int32_t token : sample(all, rows)) {
        ASSERT_TRUE(token >= 0 && token < logits.cols);
        ASSERT_GT(expected[static_cast<size_t>(token)], 0) << "token " << token;
        ++seen[static_cast<size_t>(token)];
      }
      for (size_t i = 0; i < seen.size(); ++i) {  // five sigmas of a binomial, and what is rare
        const double wanted = expected[i] * kDraws;
        EXPECT_NEAR(seen[i], wanted, 5 * std::sqrt(wanted * (1 - expected[i])) + 3) << i;
      }
    }
  }
}

/// The same numbers draw the same tokens everywhere. A device may round a weight otherwise than
/// the CPU: 1 of 1000 draws may differ.
TEST_P(SampleOps, DrawsWhatTheCpuDraws) {
  std::mt19937_64 random(5);
  const float temperatures[] = {1.0f, 0.7f, 0.1f, 3.0f, 0.0f};
  const int32_t top_ks[] = {0, 1, 40, 1000, 5000};
  const float top_ps[] = {1.0f, 0.9f, 0.5f, 0.999f, 1e-6f};
  const float min_ps[] = {0.0f, 0.0f, 0.05f, 0.3f};
  const auto one_of = [&](const auto& choices) { return choices[random() % std::size(choices)]; };
  ThreadPool pool(2);
  int64_t draws = 0;
  int64_t differ = 0;
  for (const int64_t vocabulary : {33, 1025, 5000, 92544}) {
    for (const double width : {0.3, 3.0, 30.0}) {
      constexpr int64_t kRows = 40;
      const Matrix logits = bell(kRows, vocabulary, width, random());
      std::vector<std::vector<LogitEdit>> edits(kRows);
      std::vector<SamplerRow> rows;
      for (int64_t r = 0; r < kRows; ++r) {
        SamplerRow row =
            settings(one_of(temperatures), one_of(top_ks), one_of(top_ps), one_of(min_ps));
        row.greedy = r % 8 == 0;
        row.seed = random();
        row.position = static_cast<int64_t>(random() % 100000);
        auto& changes = edits[static_cast<size_t>(r)];
        for (int32_t token = 3; r % 3 == 0 && token < vocabulary; token += 7) {
          const bool banned = random() % 4 == 0;
          changes.push_back({token, 1.1f, banned ? -std::numeric_limits<float>::infinity() : 0.2f});
        }
        row.edits = changes;
        rows.push_back(row);
      }
      const std::vector<int32_t> tokens = sample(logits, rows);
      std::vector<float> host(logits.values.begin(), logits.values.end());
      std::vector<int32_t> expected(kRows);
      cpu::sample(pool, {host.data(), DType::kF32, kRows, vocabulary, vocabulary}, rows, expected);
      for (size_t i = 0; i < rows.size(); ++i) differ += tokens[i] != expected[i] ? 1 : 0;
      draws += kRows;
    }
  }
  EXPECT_LE(differ * 1000, draws);
}

TEST_P(SampleOps, LogProbabilities) {
  for (const int64_t vocabulary : {1, 40, 1025, 50000}) {
    Matrix logits = bell(4, vocabulary, 2.0, 3);
    for (int64_t c = 0; c < vocabulary; ++c) {
      logits.at(1, c) = std::round(logits.at(1, c));  // ties
      logits.at(2, c) = c % 3 == 0 ? logits.at(2, c) : -kInf;
      logits.at(3, c) *= 32;
    }
    const DeviceMatrix on_device = matrix(acc(), logits);
    std::vector<int32_t> tokens;
    for (int64_t r = 0; r < logits.rows; ++r) {
      tokens.push_back(static_cast<int32_t>((r * 37) % vocabulary));
    }
    for (const int64_t most : {0, 1, 20, 1024}) {
      SCOPED_TRACE(testing::Message() << most << " of " << vocabulary);
      const int64_t top = std::min(most, vocabulary);
      std::vector<TokenLogprob> told(static_cast<size_t>(logits.rows * (1 + top)));
      backend().log_probabilities(on_device.view(), tokens, top, told);
      for (int64_t r = 0; r < logits.rows; ++r) {
        const auto row = logits.row(r);
        const double log_sum = reference::log_sum_exp(row);
        std::vector<int32_t> order(row.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
        std::ranges::stable_sort(order, [&](int32_t a, int32_t b) {
          return row[static_cast<size_t>(a)] > row[static_cast<size_t>(b)];
        });
        order.insert(order.begin(), tokens[static_cast<size_t>(r)]);
        for (int64_t i = 0; i <= top; ++i) {
          const TokenLogprob& one = told[static_cast<size_t>(r * (1 + top) + i)];
          ASSERT_EQ(one.token, order[static_cast<size_t>(i)]) << "row " << r << " place " << i;
          const double expected = row[static_cast<size_t>(one.token)] - log_sum;
          if (std::isinf(expected)) {
            ASSERT_EQ(one.logprob, expected);
          } else {
            ASSERT_NEAR(one.logprob, expected, 1e-6 + 1e-7 * std::abs(expected));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace longspan
