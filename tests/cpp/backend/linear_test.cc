#include "backend/cpu/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu/convert.h"
#include "reference/reference.h"

namespace longspan::cpu {
namespace {

using reference::Matrix;

constexpr int64_t kMostRows = 100;
constexpr int64_t kInner[] = {8, 20, 32, 64, 576, 577};
constexpr int64_t kOuter[] = {1, 31, 32, 33, 192};
constexpr int64_t kRows[] = {1, 2, 15, 16, 17, 31, 32, 33, kMostRows};

/// Values of a matrix as a dtype holds them.
Matrix rounded(const Matrix& values, DType dtype) {
  std::vector<float> data(values.values.size());
  const MatrixView view{data.data(), dtype, values.rows, values.cols, values.cols};
  reference::write(values, view);
  return reference::read(view);
}

/// A tensor of a checkpoint: rows wider apart than they are long, the gap NaN.
class Tensor {
 public:
  Tensor(const Matrix& values, DType dtype)
      : bits_(static_cast<size_t>(values.rows * (values.cols + kGap)), 0x7fffffff),
        view_{bits_.data(), dtype, values.rows, values.cols, values.cols + kGap, "weight"} {
    const MatrixView target{bits_.data(), dtype, values.rows, values.cols, view_.stride};
    reference::write(values, target);
  }
  const WeightView& view() const { return view_; }

 private:
  static constexpr int64_t kGap = 5;
  std::vector<uint32_t> bits_;
  WeightView view_;
};

/// What enters a linear: stride a multiple of 32, the gap finite but not zero.
class Activation {
 public:
  Activation(DType dtype, const Matrix& values)
      : bytes_(allocate_host(values.rows * round_up(values.cols, 32) * size_of(dtype))),
        view_{bytes_.data(), dtype, values.rows, values.cols, round_up(values.cols, 32)} {
    Matrix filler(values.rows, view_.stride);
    std::fill(filler.values.begin(), filler.values.end(), 3.0);
    MatrixView whole = view_;
    whole.cols = view_.stride;
    reference::write(filler, whole);
    reference::write(values, view_);
  }
  const MatrixView& view() const { return view_; }

 private:
  Buffer bytes_;
  MatrixView view_;
};

/// What leaves a linear; every byte a NaN's until written.
class Output {
 public:
  Output(int64_t rows, int64_t cols)
      : data_(static_cast<size_t>(rows * round_up(cols, 32)), std::nanf("")),
        view_{data_.data(), DType::kF32, rows, cols, round_up(cols, 32)} {}
  const MatrixView& view() const { return view_; }

 private:
  std::vector<float> data_;
  MatrixView view_;
};

using Param = std::tuple<const InstructionSet*, DType>;

std::string param_name(const testing::TestParamInfo<Param>& info) {
  std::string name(std::get<0>(info.param)->name);
  std::replace(name.begin(), name.end(), '-', '_');
  return name + "_" + std::string(name_of(std::get<1>(info.param)));
}

class Linear : public testing::TestWithParam<Param> {
 protected:
  DType dtype() const { return std::get<1>(GetParam()); }
  const Kernels& kernels() const {
    const InstructionSet& set = *std::get<0>(GetParam());
    return dtype() == DType::kF32 ? set.f32 : set.bf16;
  }
  CpuPackedLinear pack(const Matrix& weight) const {
    const Tensor tensor(weight, DType::kF32);
    return CpuPackedLinear(dtype(), {&tensor.view(), 1}, {});
  }
};

/// Each element within the bound of float32 summation in any order (Higham, "Accuracy and Stability
/// of Numerical Algorithms", 3.1): n u times the sum of magnitudes, n the number of terms.
void expect_product(const Matrix& got, const Matrix& x, const Matrix& weight, const Matrix& bias) {
  const Matrix expected = reference::linear(x, weight, bias.values);
  const auto magnitude = [](Matrix m) {
    for (double& value : m.values) value = std::abs(value);
    return m;
  };
  const Matrix sums = reference::linear(magnitude(x), magnitude(weight), magnitude(bias).values);
  const double unit = static_cast<double>(x.cols + 1) * 0x1p-24;
  for (size_t i = 0; i < got.values.size(); ++i) {
    ASSERT_LE(std::abs(got.values[i] - expected.values[i]), unit * sums.values[i]) << "at " << i;
  }
}

TEST_P(Linear, MatchesTheReferenceWhateverTheRows) {
  ThreadPool pool(2);
  for (const int64_t k : kInner) {
    for (const int64_t n : kOuter) {
      SCOPED_TRACE("k = " + std::to_string(k) + ", n = " + std::to_string(n));
      const Matrix x = rounded(reference::random_matrix(kMostRows, k, 2.0, 1), dtype());
      const Matrix weight = rounded(reference::random_matrix(n, k, 0.5, 2), dtype());
      const Matrix bias = reference::random_matrix(1, n, 1.0, 3);
      const Tensor tensor(weight, DType::kF32);
      const Tensor bias_tensor(bias, DType::kF32);
      const CpuPackedLinear packed(dtype(), {&tensor.view(), 1}, {&bias_tensor.view(), 1});
      const Activation in(dtype(), x);
      const Output all(kMostRows, n);
      linear(kernels(), pool, in.view(), packed, all.view());
      expect_product(reference::read(all.view()), x, weight, bias);

      for (const int64_t m : kRows) {
        const int64_t first = (kMostRows - m) / 2;
        const Output some(m, n);
        linear(kernels(), pool, in.view().rows_from(first, m), packed, some.view());
        for (int64_t r = 0; r < m; ++r) {
          ASSERT_EQ(std::memcmp(some.view().row<float>(r), all.view().row<float>(first + r),
                                static_cast<size_t>(n) * 4),
                    0)
              << "row " << r << " of " << m;
        }
      }
    }
  }
}

TEST_P(Linear, ThreadsAndBlocksOfRowsChangeNoBit) {
  constexpr int64_t kMany = 1100;
  const Matrix x = reference::random_matrix(kMany, 576, 2.0, 1);
  const CpuPackedLinear packed = pack(reference::random_matrix(192, 576, 0.5, 2));
  const Activation in(dtype(), x);
  const auto run = [&](int threads, int64_t rows_at_once) {
    ThreadPool pool(threads);
    std::vector<float> out(static_cast<size_t>(kMany * 192));
    const MatrixView y{out.data(), DType::kF32, kMany, 192, 192};
    for (int64_t r = 0; r < kMany; r += rows_at_once) {
      const int64_t count = std::min(rows_at_once, kMany - r);
      linear(kernels(), pool, in.view().rows_from(r, count), packed, y.rows_from(r, count));
    }
    return out;
  };
  const std::vector<float> expected = run(1, kMany);
  EXPECT_EQ(run(3, kMany), expected);
  EXPECT_EQ(run(2, 7), expected);
}

TEST_P(Linear, NotANumberReachesItsRowAlone) {
  ThreadPool pool(1);
  Matrix x = reference::random_matrix(40, 100, 2.0, 1);
  x.at(17, 33) = std::numeric_limits<double>::infinity();
  const Activation in(dtype(), x);
  if (dtype() == DType::kF32) {
    in.view().row<float>(20)[99] = std::nanf("");
  } else {
    in.view().row<uint16_t>(20)[99] = 0x7fc0;
  }
  const CpuPackedLinear packed = pack(reference::random_matrix(33, 100, 0.5, 2));
  const Output out(40, 33);
  linear(kernels(), pool, in.view(), packed, out.view());
  for (int64_t r = 0; r < 40; ++r) {
    for (int64_t c = 0; c < 33; ++c) {
      const float y = out.view().row<float>(r)[c];
      EXPECT_EQ(std::isfinite(y), r != 17 && r != 20) << r << ", " << c;
      EXPECT_EQ(std::isnan(y), r == 20) << r << ", " << c;
    }
  }
}

TEST_P(Linear, StacksPartsOfAnyDtype) {
  ThreadPool pool(1);
  const Matrix first = reference::random_matrix(40, 64, 1.0, 1);
  const Matrix second = rounded(reference::random_matrix(25, 64, 1.0, 2), DType::kBF16);
  const Matrix bias1 = reference::random_matrix(1, 40, 1.0, 3);
  const Matrix bias2 = rounded(reference::random_matrix(1, 25, 1.0, 4), DType::kBF16);
  const Tensor parts[] = {Tensor(first, DType::kF32), Tensor(second, DType::kBF16)};
  const Tensor biases[] = {Tensor(bias1, DType::kF32), Tensor(bias2, DType::kBF16)};
  const WeightView part_views[] = {parts[0].view(), parts[1].view()};
  const WeightView bias_views[] = {biases[0].view(), biases[1].view()};
  const CpuPackedLinear packed(dtype(), part_views, bias_views);
  EXPECT_EQ(packed.out_features(), 65);
  EXPECT_EQ(packed.in_features(), 64);
  Matrix weight(65, 64);
  Matrix bias(1, 65);
  const Matrix held = rounded(first, dtype());
  std::copy(held.values.begin(), held.values.end(), weight.values.begin());
  std::copy(second.values.begin(), second.values.end(), weight.values.begin() + 40 * 64);
  std::copy(bias1.values.begin(), bias1.values.end(), bias.values.begin());
  std::copy(bias2.values.begin(), bias2.values.end(), bias.values.begin() + 40);
  const Matrix x = rounded(reference::random_matrix(3, 64, 2.0, 5), dtype());
  const Activation in(dtype(), x);
  const Output out(3, 65);
  linear(kernels(), pool, in.view(), packed, out.view());
  expect_product(reference::read(out.view()), x, weight, bias);
}

TEST_P(Linear, EmbeddingReadsTheTableBack) {
  ThreadPool pool(2);
  const Matrix table = reference::random_matrix(70, 100, 1.0, 1);
  const Matrix held = rounded(table, dtype());
  const CpuPackedLinear packed = pack(table);
  const std::vector<int32_t> ids = {69, 0, 31, 32, 32};
  const Output out(5, 100);
  embedding(pool, ids, packed, 0, out.view());
  const Matrix got = reference::read(out.view());
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t c = 0; c < 100; ++c) {
      ASSERT_EQ(got.at(t, c), held.at(ids[static_cast<size_t>(t)], c)) << t << ", " << c;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, Linear,
                         testing::Combine(testing::ValuesIn(available_instruction_sets().begin(),
                                                            available_instruction_sets().end()),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         param_name);

class LogLikelihood : public Linear {
 protected:
  std::vector<double> run(const Activation& hidden, const CpuPackedLinear& head,
                          const std::vector<int32_t>& targets, int threads, int64_t first,
                          int64_t count) const {
    ThreadPool pool(threads);
    std::vector<float> workspace(static_cast<size_t>(score_workspace_bytes(threads) / 4));
    std::vector<PartialScore> scores(static_cast<size_t>(count));
    score(kernels(), pool, hidden.view().rows_from(first, count), head, 0,
          std::span(targets).subspan(static_cast<size_t>(first), static_cast<size_t>(count)),
          workspace.data(), scores);
    std::vector<double> nll;
    for (const PartialScore& part : scores) nll.push_back(negative_log_likelihood({&part, 1}));
    return nll;
  }
};

TEST_P(LogLikelihood, MatchesTheReferenceWhateverTheCompany) {
  constexpr int64_t kTokens = 300;
  for (const int64_t vocab : {1, 33, 600, 1061}) {
    // Logits up to some 60, so that one of them decides some rows.
    const Matrix x = rounded(reference::random_matrix(kTokens, 64, 4.0, 1), dtype());
    const Matrix weight = rounded(reference::random_matrix(vocab, 64, 2.0, 2), dtype());
    const CpuPackedLinear head = pack(weight);
    const Activation hidden(dtype(), x);
    std::vector<int32_t> targets;
    for (int64_t t = 0; t < kTokens; ++t) {
      targets.push_back(static_cast<int32_t>(t * 7919 % vocab));
    }
    const std::vector<double> nll = run(hidden, head, targets, 1, 0, kTokens);
    const Matrix logits = reference::linear(x, weight);
    for (int64_t t = 0; t < kTokens; ++t) {
      const auto i = static_cast<size_t>(t);
      const double expected = reference::log_sum_exp(logits.row(t)) - logits.at(t, targets[i]);
      // Two logits of 64 products of at most 8 each, in float32, and a sum of float32 terms.
      ASSERT_NEAR(nll[i], expected, 2 * 64 * 0x1p-24 * 512 * 0.25 + 1e-6) << t << " of " << vocab;
    }
    EXPECT_EQ(run(hidden, head, targets, 3, 0, kTokens), nll);
    const std::vector<double> part = run(hidden, head, targets, 2, 131, 5);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), nll.begin() + 131));
  }
}

TEST_P(LogLikelihood, BadInputIsNeverFinite) {
  for (const double bad : {std::nan(""), double{INFINITY}}) {
    const Matrix x = reference::random_matrix(3, 64, 1.0, 1);
    const Activation hidden(dtype(), x);
    if (dtype() == DType::kF32) {
      hidden.view().row<float>(1)[5] = static_cast<float>(bad);
    } else {
      hidden.view().row<uint16_t>(1)[5] = std::isnan(bad) ? 0x7fc0 : 0x7f80;
    }
    const CpuPackedLinear head = pack(reference::random_matrix(600, 64, 1.0, 2));
    const std::vector<double> nll = run(hidden, head, {0, 1, 2}, 1, 0, 3);
    EXPECT_TRUE(std::isfinite(nll[0]) && std::isfinite(nll[2]));
    EXPECT_FALSE(std::isfinite(nll[1]));
  }
}

TEST_P(LogLikelihood, OneBadLogitIsEnough) {
  const Matrix x = reference::random_matrix(2, 64, 1.0, 1);
  const Activation hidden(dtype(), x);
  for (const int64_t row : {7, 599}) {
    Matrix weight = reference::random_matrix(600, 64, 1.0, 2);
    weight.at(row, 3) = std::nan("");
    const std::vector<double> nll = run(hidden, pack(weight), {0, 1}, 1, 0, 2);
    EXPECT_FALSE(std::isfinite(nll[0])) << row;
  }
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, LogLikelihood,
                         testing::Combine(testing::ValuesIn(available_instruction_sets().begin(),
                                                            available_instruction_sets().end()),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         param_name);

TEST(Convert, RoundsToNearestEvenAndKeepsNotANumber) {
  for (const float x :
       {0.0F, -0.0F, 1.0F, 1.00390625F, 1.01171875F, -3.1415926F, 3.4e38F, 1e-40F}) {
    EXPECT_EQ(from_float<bf16_t>(x), reference::bf16_bits(x)) << x;
  }
  const auto nan = std::bit_cast<float>(0x7f800001U);  // cutting it would leave infinity
  EXPECT_TRUE(std::isnan(to_float(from_float<bf16_t>(nan))));
}

TEST(Convert, ReadsHalfPrecision) {
  const uint16_t halves[] = {0x0000, 0x8000, 0x3c00, 0xc000, 0x7bff,
                             0x0001, 0x03ff, 0x7c00, 0x3555};
  const float expected[] = {0.0F,     -0.0F,           1.0F,     -2.0F,      65504.0F,
                            0x1p-24F, 1023 * 0x1p-24F, INFINITY, 0x1.554p-2F};
  float got[9];
  read_floats({halves, DType::kF16, 1, 9, 9, "half"}, 0, got);
  EXPECT_EQ(std::memcmp(got, expected, sizeof(got)), 0);
}

}  // namespace
}  // namespace longspan::cpu
