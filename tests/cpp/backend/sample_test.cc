#include "backend/cpu/sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "reference/reference.h"

namespace longspan::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

SamplerRow settings(float temperature, int32_t top_k, float top_p, uint64_t seed = 0,
                    int64_t position = 0) {
  return {.greedy = false,
          .temperature = temperature,
          .top_k = top_k,
          .top_p = top_p,
          .seed = seed,
          .position = position};
}

reference::SamplerSettings reference_settings(const SamplerRow& row) {
  reference::SamplerSettings settings{row.temperature, row.top_k, row.top_p, row.min_p, {}};
  for (const LogitEdit& edit : row.edits) {
    settings.edits.push_back({static_cast<size_t>(edit.token), edit.penalty, edit.add});
  }
  return settings;
}

/// Samples rows of logits of the same width.
std::vector<int32_t> sample_rows(const std::vector<std::vector<float>>& logits,
                                 const std::vector<SamplerRow>& rows, int threads = 1) {
  const auto cols = static_cast<int64_t>(logits[0].size());
  const int64_t stride = cols + 3;
  std::vector<float> data(static_cast<size_t>(stride) * logits.size(),
                          kNan);  // gaps must not matter
  for (size_t r = 0; r < logits.size(); ++r) {
    std::copy(logits[r].begin(), logits[r].end(), data.begin() + static_cast<int64_t>(r) * stride);
  }
  std::vector<int32_t> tokens(logits.size(), -2);
  ThreadPool pool(threads);
  sample(pool, {data.data(), DType::kF32, static_cast<int64_t>(logits.size()), cols, stride}, rows,
         tokens);
  return tokens;
}

int32_t sample_one(const std::vector<float>& logits, const SamplerRow& row) {
  return sample_rows({logits}, {row})[0];
}

std::vector<float> random_logits(int64_t vocab_size, double scale, uint64_t seed) {
  const reference::Matrix values = reference::random_matrix(1, vocab_size, scale, seed);
  return {values.values.begin(), values.values.end()};
}

TEST(SampleGreedy, TakesTheFirstLargest) {
  for (const int64_t vocab_size : {1, 2, 15, 16, 17, 31, 32, 33, 1000, 49152}) {
    std::vector<float> logits = random_logits(vocab_size, 5.0, static_cast<uint64_t>(vocab_size));
    const auto expected = std::max_element(logits.begin(), logits.end()) - logits.begin();
    EXPECT_EQ(sample_one(logits, {}), expected) << vocab_size;
  }
  EXPECT_EQ(sample_one({1, 4, 2, 4, 4}, {}), 1);
  EXPECT_EQ(sample_one({-3, -0.0f, 0.0f}, {}), 1);  // -0 equals +0
  EXPECT_EQ(sample_one({-kInf, -2e38f, -kInf}, {}), 1);
}

TEST(Sample, NarrowSettingsAreGreedy) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    std::vector<float> logits = random_logits(997, 3.0, seed);
    const int32_t greedy = sample_one(logits, {});
    EXPECT_EQ(sample_one(logits, settings(5.0f, 1, 1.0f, seed)), greedy);
    EXPECT_EQ(sample_one(logits, settings(5.0f, 0, 1e-6f, seed)), greedy);
    EXPECT_EQ(sample_one(logits, settings(5.0f, 0, std::numeric_limits<float>::min(), seed)),
              greedy);
    EXPECT_EQ(sample_one(logits, settings(1e-6f, 0, 1.0f, seed)), greedy);
    EXPECT_EQ(sample_one(logits, settings(0.0f, 0, 0.9f, seed)), greedy);  // underflow of 1e-50
  }
  // Neighbouring floats differ.
  const float above = std::nextafter(1.0f, 2.0f);
  EXPECT_EQ(sample_one({1.0f, above, 1.0f}, settings(1.0f, 1, 1.0f)), 1);
  EXPECT_EQ(sample_one({-above, -1.0f, -above}, settings(1.0f, 1, 1.0f)), 1);
  // Among equals the lowest ids are kept.
  EXPECT_EQ(sample_one({1, 7, 2, 7, 7}, settings(1.0f, 1, 1.0f, 3)), 1);
  EXPECT_EQ(sample_one({1, 7, 2, 7, 7}, settings(1.0f, 0, 0.01f, 3)), 1);
}

struct Distribution {
  const char* name;
  std::vector<float> logits;
  SamplerRow row;
};

/// Pearson's chi-square over the tokens expected at least 10 times, the rest in one cell.
/// Tokens of probability 0 must never come.
void expect_drawn_from(const Distribution& d) {
  constexpr int kDraws = 20000;
  const std::vector<double> logits(d.logits.begin(), d.logits.end());
  const std::vector<double> expected =
      reference::sampler_probabilities(logits, reference_settings(d.row));
  std::vector<int> seen(logits.size(), 0);
  ThreadPool pool(1);
  std::vector<float> data = d.logits;
  const MatrixView view{data.data(), DType::kF32, 1, static_cast<int64_t>(data.size()),
                        static_cast<int64_t>(data.size())};
  for (int i = 0; i < kDraws; ++i) {
    SamplerRow row = d.row;
    row.position = i;
    int32_t token = -2;
    sample(pool, view, {&row, 1}, {&token, 1});
    ASSERT_GE(token, 0);
    ASSERT_GT(expected[static_cast<size_t>(token)], 0.0) << d.name << ": token " << token;
    ++seen[static_cast<size_t>(token)];
  }
  double chi_square = 0;
  double rest_expected = 0;
  double rest_seen = 0;
  int cells = 0;
  const auto add = [&](double count, double wanted) {
    chi_square += (count - wanted) * (count - wanted) / wanted;
    ++cells;
  };
  for (size_t token = 0; token < seen.size(); ++token) {
    const double wanted = expected[token] * kDraws;
    if (wanted >= 10) {
      add(seen[token], wanted);
    } else {
      rest_expected += wanted;
      rest_seen += seen[token];
    }
  }
  if (rest_expected > 0) add(rest_seen, rest_expected);
  // Wilson and Hilferty: (X / n)^(1/3) is close to normal. 4 sigma at fixed seeds.
  const double n = std::max(1, cells - 1);
  const double sigma = std::sqrt(2 / (9 * n));
  EXPECT_LT((std::cbrt(chi_square / n) - (1 - 2 / (9 * n))) / sigma, 4.0)
      << d.name << ": chi-square " << chi_square << " over " << cells << " cells";
}

TEST(Sample, DrawsFromTheReferenceDistribution) {
  const std::vector<float> logits = random_logits(301, 3.0, 11);
  std::vector<float> tied = random_logits(64, 2.0, 5);
  for (float& x : tied) x = std::round(x);  // many equal logits
  std::vector<float> holes = logits;
  for (size_t i = 0; i < holes.size(); i += 3) holes[i] = -kInf;
  const std::vector<Distribution> cases = {
      {"plain", logits, settings(1.0f, 0, 1.0f)},
      {"hot", logits, settings(2.5f, 0, 1.0f, 1)},
      {"cold", logits, settings(0.3f, 0, 1.0f, 2)},
      {"top_k", logits, settings(1.0f, 40, 1.0f, 3)},
      {"top_k over vocab", logits, settings(1.0f, 5000, 1.0f, 4)},
      {"top_p", logits, settings(1.0f, 0, 0.7f, 5)},
      {"top_p high", logits, settings(1.0f, 0, 0.999f, 6)},
      {"top_k and top_p", logits, settings(0.8f, 50, 0.8f, 7)},
      {"tied top_k", tied, settings(1.0f, 7, 1.0f, 8)},
      {"tied top_p", tied, settings(1.0f, 0, 0.55f, 9)},
      {"tied both", tied, settings(1.5f, 9, 0.93f, 10)},
      {"all equal", std::vector<float>(50, 2.0f), settings(1.0f, 0, 0.5f, 11)},
      {"-inf", holes, settings(1.0f, 0, 0.9f, 12)},
      {"-inf in top_k", {-kInf, 1.0f, -kInf, 0.5f}, settings(1.0f, 3, 1.0f, 13)},
      {"signed zeros", {-0.0f, -0.0f, 0.0f, -1.0f}, settings(1.0f, 2, 1.0f, 14)},
      {"huge", {3e38f, 3e38f, -3e38f}, settings(1.0f, 0, 1.0f, 15)},
  };
  for (const Distribution& d : cases) expect_drawn_from(d);
}

TEST(Sample, DrawsFromTheReferenceDistributionAfterEditsAndMinP) {
  const std::vector<float> logits = random_logits(301, 3.0, 11);
  std::vector<LogitEdit> penalties;  // of likely, unlikely and negative ones alike
  for (int32_t token = 0; token < 301; token += 2) {
    penalties.push_back(
        {.token = token, .penalty = 1.3f, .add = -0.1f * static_cast<float>(token % 7)});
  }
  std::vector<LogitEdit> bans;
  for (int32_t token = 300; token >= 0; token -= 3) bans.push_back({.token = token, .add = -kInf});
  std::vector<LogitEdit> rewards = {{.token = 7, .penalty = 0.5f, .add = 2.0f},
                                    {.token = 9, .add = 4.0f}};
  const auto with = [](SamplerRow row, float min_p, std::span<LogitEdit> edits) {
    row.min_p = min_p;
    row.edits = edits;
    return row;
  };
  const std::vector<Distribution> cases = {
      {"min_p", logits, with(settings(1.0f, 0, 1.0f, 21), 0.1f, {})},
      {"min_p, hot", logits, with(settings(2.0f, 0, 1.0f, 22), 0.3f, {})},
      {"min_p of 1", logits, with(settings(1.0f, 0, 1.0f, 23), 1.0f, {})},
      {"min_p within top_p", logits, with(settings(1.0f, 0, 0.9f, 24), 0.02f, {})},
      {"min_p after top_p", logits, with(settings(1.0f, 60, 0.6f, 25), 0.001f, {})},
      {"penalties", logits, with(settings(1.0f, 0, 1.0f, 26), 0.0f, penalties)},
      {"bans", logits, with(settings(1.0f, 0, 0.95f, 27), 0.0f, bans)},
      {"rewards", logits, with(settings(1.5f, 20, 1.0f, 28), 0.05f, rewards)},
  };
  for (const Distribution& d : cases) expect_drawn_from(d);
}

TEST(SampleGreedy, TakesTheLargestEditedLogitAndLeavesTheLogitsAsTheyWere) {
  std::vector<float> logits = {1, 4, 2, 3.5f, -1};
  const std::vector<float> before = logits;
  ThreadPool pool(1);
  const auto greedy = [&](std::vector<LogitEdit> edits) {
    const SamplerRow row{.edits = edits};
    int32_t token = -2;
    sample(pool, {logits.data(), DType::kF32, 1, 5, 5}, {&row, 1}, {&token, 1});
    EXPECT_EQ(logits, before);
    return token;
  };
  EXPECT_EQ(greedy({{.token = 1, .add = -kInf}}), 3);
  EXPECT_EQ(greedy({{.token = 1, .penalty = 1.5f}, {.token = 3, .penalty = 1.5f}}), 1);
  EXPECT_EQ(greedy({{.token = 1, .penalty = 2.5f}, {.token = 3, .penalty = 2.5f}}), 2);
  EXPECT_EQ(greedy({{.token = 4, .penalty = 0.1f, .add = 4.2f}}), 4);
  EXPECT_EQ(greedy({{.token = 0, .add = -kInf},
                    {.token = 1, .add = -kInf},
                    {.token = 2, .add = -kInf},
                    {.token = 3, .add = -kInf},
                    {.token = 4, .add = -kInf}}),
            -1);
  logits[2] = kNan;
  std::vector<LogitEdit> ban = {{.token = 2, .add = -kInf}};  // hides no NaN
  const SamplerRow row{.edits = ban};
  int32_t token = -2;
  sample(pool, {logits.data(), DType::kF32, 1, 5, 5}, {&row, 1}, {&token, 1});
  EXPECT_EQ(token, -1);
}

TEST(Sample, KeepsExactlyTheReferenceSet) {
  // Over a large vocabulary every kept token is drawn only rarely; look at the set by its edges:
  // with the temperature high, all that is kept is nearly equally likely.
  const std::vector<float> logits = random_logits(2000, 1.0, 3);
  const std::vector<double> wide(logits.begin(), logits.end());
  const SamplerRow row = settings(100.0f, 30, 1.0f);
  const std::vector<double> expected =
      reference::sampler_probabilities(wide, reference_settings(row));
  std::set<int32_t> seen;
  for (int64_t position = 0; position < 1000; ++position) {
    SamplerRow at = row;
    at.position = position;
    seen.insert(sample_one(logits, at));
  }
  std::set<int32_t> kept;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] > 0) kept.insert(static_cast<int32_t>(i));
  }
  EXPECT_EQ(seen, kept);
}

TEST(Sample, SeedAndPositionAloneFixTheToken) {
  const std::vector<float> a = random_logits(500, 1.0, 1);
  const std::vector<float> b = random_logits(500, 1.0, 2);
  const SamplerRow row = settings(1.0f, 100, 0.95f, 42, 17);
  const SamplerRow other = settings(0.7f, 0, 1.0f, 43, 17);
  const int32_t alone = sample_one(a, row);
  EXPECT_EQ(sample_one(a, row), alone);
  for (const int threads : {1, 2, 4}) {
    const std::vector<int32_t> tokens =
        sample_rows({b, a, b, a, a}, {other, row, row, other, row}, threads);
    EXPECT_EQ(tokens[1], alone);
    EXPECT_EQ(tokens[4], alone);
  }
  std::set<int32_t> by_seed;
  std::set<int32_t> by_position;
  for (int i = 0; i < 50; ++i) {
    by_seed.insert(sample_one(a, settings(1.0f, 0, 1.0f, static_cast<uint64_t>(i) << 32, 5)));
    by_position.insert(sample_one(a, settings(1.0f, 0, 1.0f, 9, i)));
  }
  EXPECT_GT(by_seed.size(), 20u);
  EXPECT_GT(by_position.size(), 20u);
}

TEST(Sample, RowsThatAreNotFiniteGiveMinusOneAndHarmNoOther) {
  const std::vector<float> good = random_logits(100, 1.0, 1);
  for (const SamplerRow& row :
       {SamplerRow{}, settings(1.0f, 0, 1.0f, 3), settings(1.0f, 5, 0.5f, 3)}) {
    const int32_t token = sample_one(good, row);
    for (const size_t place : {0u, 50u, 99u}) {
      std::vector<float> nan = good;
      nan[place] = kNan;
      std::vector<float> negative_nan = good;
      negative_nan[place] = -kNan;
      std::vector<float> infinite = good;
      infinite[place] = kInf;
      const std::vector<float> nothing(100, -kInf);
      EXPECT_EQ(sample_rows({good, nan, good, infinite, nothing, negative_nan, good},
                            std::vector<SamplerRow>(7, row), 2),
                (std::vector<int32_t>{token, -1, token, -1, -1, -1, token}));
    }
  }
}

}  // namespace
}  // namespace longspan::cpu
