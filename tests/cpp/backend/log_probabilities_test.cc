#include "backend/cpu/log_probabilities.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/reference.h"

namespace longspan::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

/// Rows of logits next to one another, with a gap of NaN after each.
struct Logits {
  int64_t cols;
  std::vector<float> data;

  Logits(int64_t rows, int64_t cols_, double scale, uint64_t seed) : cols(cols_) {
    const reference::Matrix values = reference::random_matrix(rows, cols, scale, seed);
    for (int64_t r = 0; r < rows; ++r) {
      const auto row = values.row(r);
      data.insert(data.end(), row.begin(), row.end());
      data.push_back(std::numeric_limits<float>::quiet_NaN());
    }
  }
  MatrixView view() {
    return {data.data(), DType::kF32, std::ssize(data) / (cols + 1), cols, cols + 1};
  }
  float at(int64_t r, int64_t c) { return view().row<float>(r)[c]; }
};

class LogProbabilities : public testing::TestWithParam<const InstructionSet*> {
 protected:
  std::vector<TokenLogprob> run(Logits& logits, const std::vector<int32_t>& tokens, int64_t top) {
    std::vector<TokenLogprob> out(tokens.size() * static_cast<size_t>(1 + top));
    ThreadPool pool(2);
    log_probabilities(GetParam()->f32, pool, logits.view(), tokens, top, out);
    return out;
  }
};

TEST_P(LogProbabilities, AreThoseOfTheReference) {
  for (const int64_t cols : {1, 2, 31, 128, 129, 1000, 49152}) {
    Logits logits(3, cols, 8.0, static_cast<uint64_t>(cols));
    const std::vector<int32_t> tokens = {0, static_cast<int32_t>(cols / 2),
                                         static_cast<int32_t>(cols - 1)};
    const int64_t top = std::min<int64_t>(cols, 20);
    const std::vector<TokenLogprob> out = run(logits, tokens, top);
    for (int64_t r = 0; r < 3; ++r) {
      std::vector<double> row;
      for (int64_t c = 0; c < cols; ++c) row.push_back(logits.at(r, c));
      const double log_sum = reference::log_sum_exp(row);
      std::vector<int32_t> order(row.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return row[static_cast<size_t>(a)] > row[static_cast<size_t>(b)];
      });
      order.insert(order.begin(), tokens[static_cast<size_t>(r)]);
      for (int64_t i = 0; i <= top; ++i) {
        const TokenLogprob& got = out[static_cast<size_t>(r * (1 + top) + i)];
        const int32_t token = order[static_cast<size_t>(i)];
        EXPECT_EQ(got.token, token) << cols << " " << r << " " << i;
        EXPECT_NEAR(got.logprob, row[static_cast<size_t>(token)] - log_sum, 4e-6) << cols;
      }
    }
  }
}

TEST_P(LogProbabilities, PutsTheLowerOfEqualsFirst) {
  Logits logits(1, 6, 1.0, 1);
  std::copy_n(std::vector<float>{2, 5, 2, 5, -kInf, 1}.begin(), 6, logits.data.begin());
  const std::vector<TokenLogprob> out = run(logits, {4}, 6);
  std::vector<int32_t> tokens;
  for (const TokenLogprob& one : out) tokens.push_back(one.token);
  EXPECT_EQ(tokens, (std::vector<int32_t>{4, 1, 3, 0, 2, 5, 4}));
  EXPECT_EQ(out[0].logprob, -kInf);
}

TEST_P(LogProbabilities, SurvivesARunOfNothing) {
  Logits logits(1, 300, 1.0, 1);
  std::fill_n(logits.data.begin(), 299, -kInf);
  EXPECT_EQ(run(logits, {299}, 0)[0].logprob, 0.0f);
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, LogProbabilities,
                         testing::ValuesIn(available_instruction_sets().begin(),
                                           available_instruction_sets().end()),
                         [](const auto& info) {
                           std::string name(info.param->name);
                           std::erase_if(name, [](char c) { return std::isalnum(c) == 0; });
                           return name;
                         });

}  // namespace
}  // namespace longspan::cpu
