#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/device.h"

namespace longspan {
namespace {

using reference::Matrix;

class LinearOps : public Ops {
 protected:
  /// Largest error of a sum of `terms` products of values of at most a and b: float32 sums, whose
  /// roundings grow like the root of their number, with some room.
  static double sum_error(int64_t terms, double a, double b) {
    return 8 * 0x1p-24 * std::sqrt(static_cast<double>(terms)) * a * b * 8;
  }
};
LONGSPAN_TEST_DEVICES(LinearOps);

TEST_P(LinearOps, LinearWithStackedPartsAndBiases) {
  for (const int64_t in : {8, 64, 576, 2048}) {
    const Matrix parts[] = {reference::random_matrix(48, in, 0.5, 1),
                            reference::random_matrix(16, in, 0.5, 2),
                            reference::random_matrix(32, in, 0.5, 3)};
    const Matrix biases[] = {reference::random_matrix(1, 48, 1.0, 4),
                             reference::random_matrix(1, 16, 1.0, 5),
                             reference::random_matrix(1, 32, 1.0, 6)};
    std::vector<HostWeight> weights;
    std::vector<HostWeight> bias_weights;
    std::vector<WeightView> weight_views;
    std::vector<WeightView> bias_views;
    Matrix stacked(96, in);
    std::vector<double> bias;
    int64_t row = 0;
    for (size_t p = 0; p < 3; ++p) {
      weight_views.push_back(weights.emplace_back(parts[p], DType::kBF16).view());
      bias_views.push_back(bias_weights.emplace_back(biases[p], DType::kBF16).view());
      const Matrix part = rounded(parts[p], DType::kBF16);
      std::copy(part.values.begin(), part.values.end(), stacked.values.begin() + row * in);
      const Matrix added = rounded(biases[p], DType::kBF16);
      bias.insert(bias.end(), added.values.begin(), added.values.end());
      row += part.rows;
    }
    for (const bool with_bias : {true, false}) {
      const std::unique_ptr<PackedLinear> packed = backend().pack_linear(
          weight_views, with_bias ? bias_views : std::vector<WeightView>{}, LinearDType::kNative);
      EXPECT_EQ(packed->out_features(), 96);
      EXPECT_EQ(packed->in_features(), in);
      for (const int64_t rows : {1, 5, 16, 17, 130}) {
        const DeviceMatrix x = matrix(act(), reference::random_matrix(rows, in, 2.0, 7));
        for (const DType dtype : {out(), acc()}) {
          SCOPED_TRACE(testing::Message() << rows << " x " << in << " " << name_of(dtype));
          const DeviceMatrix y = matrix(dtype, rows, 96);
          backend().linear(x.view(), *packed, y.view());
          expect_close(y.read(),
                       reference::linear(
                           x.read(), stacked,
                           with_bias ? std::span<const double>(bias) : std::span<const double>()),
                       rounding_of(dtype), sum_error(in, 2.0, 0.5));
        }
      }
    }
  }
}

TEST_P(LinearOps, LinearAndSiluMulAtOnce) {
  for (const auto& [in, inner] : {std::pair{64, 16}, {576, 112}, {1000, 36}, {4096, 77}}) {
    const double unit = 1.0 / std::sqrt(static_cast<double>(in));  // so that gates are of all sizes
    const Matrix weight =
        rounded(reference::random_matrix(2 * inner, in, 8 * unit, 1), DType::kBF16);
    const Matrix bias = rounded(reference::random_matrix(1, 2 * inner, 1.0, 2), DType::kBF16);
    const HostWeight host(weight, DType::kBF16);
    const HostWeight host_bias(bias, DType::kBF16);
    const std::unique_ptr<PackedLinear> packed =
        backend().pack_linear({&host.view(), 1}, {&host_bias.view(), 1}, LinearDType::kNative);
    for (const int64_t rows : {1, 7, 8, 9, 16, 17, 50}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << in << " x 2 * " << inner);
      const SiluMul at_once = silu_mul_at_once(*packed, rows);
      if (2 * inner % 32 != 0) continue;  // a CPU writes to the padding, which read() looks at
      expect_close(at_once.result.read(), reference::silu_mul(at_once.gate_up.read()),
                   2e-6 + rounding_of(act()), 1e-30);
    }
  }
}

TEST_P(LinearOps, NegativeLogLikelihood) {
  constexpr int64_t kIn = 64;
  for (const int64_t vocabulary : {1, 33, 1000, 5000}) {
    const Matrix head = rounded(reference::random_matrix(vocabulary, kIn, 0.5, 1), DType::kBF16);
    const std::unique_ptr<PackedLinear> packed = pack(head);
    for (const int64_t rows : {1, 17, 100}) {
      SCOPED_TRACE(testing::Message() << rows << " rows of " << vocabulary);
      const DeviceMatrix hidden = matrix(act(), reference::random_matrix(rows, kIn, 2.0, 2));
      const DeviceMatrix workspace = matrix(acc(), 16, vocabulary);
      std::vector<int32_t> targets;
      for (int64_t r = 0; r < rows; ++r) {
        targets.push_back(static_cast<int32_t>(r * 7919 % vocabulary));
      }
      std::vector<PartialScore> scores(targets.size());
      backend().score(hidden.view(), *packed, 0, targets, workspace.view(), scores);
      // The same from two heads that share the vocabulary out.
      const int64_t middle = vocabulary / 3;
      std::vector<PartialScore> low(targets.size());
      std::vector<PartialScore> high(targets.size());
      if (middle > 0) {
        const auto rows_of = [&](int64_t begin, int64_t end) {
          Matrix part(end - begin, kIn);
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t c = 0; c < kIn; ++c) part.at(r - begin, c) = head.at(r, c);
          }
          return pack(part);
        };
        const DeviceMatrix of_low = matrix(acc(), 16, middle);
        const DeviceMatrix of_high = matrix(acc(), 16, vocabulary - middle);
        backend().score(hidden.view(), *rows_of(0, middle), 0, targets, of_low.view(), low);
        backend().score(hidden.view(), *rows_of(middle, vocabulary), static_cast<int32_t>(middle),
                        targets, of_high.view(), high);
      }
      const Matrix logits = reference::linear(hidden.read(), head);
      for (int64_t r = 0; r < rows; ++r) {
        const auto i = static_cast<size_t>(r);
        const double expected = reference::log_sum_exp(logits.row(r)) - logits.at(r, targets[i]);
        const double tolerance = 2 * sum_error(kIn, 2.0, 0.5) + 1e-6;
        EXPECT_NEAR(negative_log_likelihood({&scores[i], 1}), expected, tolerance) << r;
        if (middle == 0) continue;
        EXPECT_NEAR(negative_log_likelihood(std::array{low[i], high[i]}), expected, tolerance) << r;
      }
    }
  }
}

TEST_P(LinearOps, NegativeLogLikelihoodOfBadInputIsNotFinite) {
  const Matrix head = reference::random_matrix(100, 64, 0.5, 1);
  const std::unique_ptr<PackedLinear> packed = pack(head);
  Matrix values = reference::random_matrix(3, 64, 2.0, 2);
  values.at(1, 5) = std::numeric_limits<double>::infinity();
  const DeviceMatrix hidden(backend(), act(), values);
  const DeviceMatrix workspace = matrix(acc(), 4, 100);
  std::vector<PartialScore> scores(3);
  backend().score(hidden.view(), *packed, 0, std::vector<int32_t>{1, 2, 3}, workspace.view(),
                  scores);
  const auto is_finite = [&](size_t i) {
    return std::isfinite(negative_log_likelihood({&scores[i], 1}));
  };
  EXPECT_TRUE(is_finite(0) && is_finite(2));
  EXPECT_FALSE(is_finite(1));
}

}  // namespace
}  // namespace longspan
