#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/device.h"

// Linears in every dtype that a device has: y is what double precision makes of the numbers that
// its codes and scales stand for.

namespace longspan {
namespace {

using reference::Matrix;

/// Zeros up to a multiple of 128 columns, then each run of the largest power of two up to 512 that
/// divides them times an orthonormal Hadamard matrix (its element i, j is the sign of the bits that
/// i and j share).
Matrix turned(const Matrix& values) {
  const int64_t cols = (values.cols + 127) / 128 * 128;
  const int64_t run = std::min<int64_t>(512, cols & -cols);
  Matrix out(values.rows, cols);
  for (int64_t r = 0; r < values.rows; ++r) {
    for (int64_t c = 0; c < values.cols; ++c) out.at(r, c) = values.at(r, c);
    for (int64_t half = 1; half < run; half *= 2) {
      for (int64_t c = 0; c < cols; ++c) {
        if ((c & half) != 0) continue;
        const double a = out.at(r, c);
        const double b = out.at(r, c + half);
        out.at(r, c) = a + b;
        out.at(r, c + half) = a - b;
      }
    }
    for (int64_t c = 0; c < cols; ++c) out.at(r, c) /= std::sqrt(static_cast<double>(run));
  }
  return out;
}

double most_of(std::span<const double> row) {
  double most = 0;
  for (const double x : row) most = std::max(most, std::abs(x));
  return most;
}

/// A matrix as a linear in a dtype multiplies it: in int8 turned, in codes and a scale for each
/// row.
Matrix held_in(LinearDType dtype, const Matrix& values) {
  if (dtype == LinearDType::kNative) return values;
  Matrix out = turned(values);
  for (int64_t r = 0; r < out.rows; ++r) {
    const double scale = std::max(most_of(out.row(r)) / 127, std::numeric_limits<double>::min());
    for (int64_t c = 0; c < out.cols; ++c) out.at(r, c) = scale * std::rint(out.at(r, c) / scale);
  }
  return out;
}

void copy_row(const Matrix& from, int64_t row, Matrix& to, int64_t to_row) {
  for (int64_t c = 0; c < from.cols; ++c) to.at(to_row, c) = from.at(row, c);
}

/// Some rows of a matrix.
Matrix rows_of(const Matrix& values, std::span<const int64_t> rows) {
  Matrix out(static_cast<int64_t>(rows.size()), values.cols);
  for (int64_t i = 0; i < out.rows; ++i) copy_row(values, rows[static_cast<size_t>(i)], out, i);
  return out;
}

/// Rows of very different sizes, so that none passes under another's scale.
Matrix uneven(Matrix values, double base) {
  for (int64_t r = 0; r < values.rows; ++r) {
    const double factor = std::pow(base, static_cast<double>(r % 5));
    for (int64_t c = 0; c < values.cols; ++c) values.at(r, c) *= factor;
  }
  return values;
}

/// The signs of a Hadamard matrix: one that is turned has a single element in a row.
Matrix signs(int64_t size) {
  Matrix out(size, size);
  for (int64_t r = 0; r < size; ++r) {
    for (int64_t c = 0; c < size; ++c) {
      int shared = 0;
      for (int64_t bits = r & c; bits != 0; bits &= bits - 1) ++shared;
      out.at(r, c) = shared % 2 == 0 ? 1.0 : -1.0;
    }
  }
  return out;
}

class LinearDTypeOps : public Ops {
 protected:
  /// Expects y = x W^T + bias in int8 within the rounding of y and of the scales. A code of either
  /// side, where double precision sees a tie, may be the next one.
  void expect_linear(const Matrix& y, const Matrix& x, const Matrix& weight,
                     std::span<const double> bias) const {
    const Matrix in = held_in(LinearDType::kInt8, x);
    const Matrix in_weight = held_in(LinearDType::kInt8, weight);
    const Matrix want = reference::linear(in, in_weight, bias);
    for (int64_t r = 0; r < want.rows; ++r) {
      for (int64_t c = 0; c < want.cols; ++c) {
        const double most = most_of(in.row(r)) * most_of(in_weight.row(c));
        const double of_sums = 0x1p-19 * static_cast<double>(in.cols) * most;
        const double room =
            rounding_of(out()) * std::abs(want.at(r, c)) + of_sums + 2.0 / 127 * most;
        ASSERT_LE(std::abs(y.at(r, c) - want.at(r, c)), room)
            << "at " << r << ", " << c << ": " << y.at(r, c) << ", expected " << want.at(r, c);
      }
    }
  }
};
LONGSPAN_TEST_DEVICES(LinearDTypeOps);

TEST_P(LinearDTypeOps, StackedPartsAndBiases) {
  for (const LinearDType dtype : backend().linear_dtypes()) {
    if (dtype == LinearDType::kNative) continue;
    for (const auto& [in, out_features] : {std::pair{64, 96}, {100, 90}, {576, 96}, {2048, 90}}) {
      const Matrix weight =
          rounded(uneven(reference::random_matrix(out_features, in, 0.5, 1), 3.0), DType::kBF16);
      const Matrix bias = rounded(reference::random_matrix(1, out_features, 1.0, 2), DType::kBF16);
      const HostWeight host(weight, DType::kBF16);
      const HostWeight host_bias(bias, DType::kBF16);
      std::vector<WeightView> parts;
      std::vector<WeightView> biases;
      for (const auto& [begin, count] : {std::pair{0, 45}, {45, 16}, {61, out_features - 61}}) {
        WeightView part = host.view();
        part.data = part.row(begin);
        part.rows = count;
        parts.push_back(part);
        WeightView of_part = host_bias.view();
        of_part.data = static_cast<const char*>(of_part.data) + begin * size_of(DType::kBF16);
        of_part.cols = count;
        biases.push_back(of_part);
      }
      for (const bool with_bias : {true, false}) {
        const std::unique_ptr<PackedLinear> packed =
            backend().pack_linear(parts, with_bias ? biases : std::vector<WeightView>{}, dtype);
        EXPECT_EQ(packed->out_features(), out_features);
        EXPECT_EQ(packed->in_features(), in);
        EXPECT_EQ(packed->linear_dtype(), dtype);
        for (const int64_t rows : {1, 5, 16, 17, 130, 300}) {
          SCOPED_TRACE(testing::Message()
                       << name_of(dtype) << " " << rows << " x " << in << " x " << out_features);
          const DeviceMatrix x = matrix(act(), uneven(reference::random_matrix(rows, in, 2, 3), 4));
          const DeviceMatrix y = matrix(out(), rows, out_features);
          backend().linear(x.view(), *packed, y.view());
          expect_linear(
              y.read(), x.read(), weight,
              with_bias ? std::span<const double>(bias.values) : std::span<const double>());
        }
      }
    }
  }
}

/// Products with what turns into an identity hand out the codes of the other side, one by one.
TEST_P(LinearDTypeOps, EveryCodeIsTheReferences) {
  constexpr int64_t kSize = 256;
  constexpr double kRoot = 16;  // of the run's length
  Matrix values = uneven(reference::random_matrix(kSize, kSize, 1.0, 4), 1e-3);
  for (int64_t c = 0; c < kSize; ++c) values.at(8, c) = 0.0;
  values = rounded(values, DType::kBF16);
  const Matrix in_runs = turned(values);
  const auto expect_codes = [&](const Matrix& y, bool transposed) {
    for (int64_t r = 0; r < (transposed ? kSize : y.rows); ++r) {
      const double scale = most_of(in_runs.row(r)) / 127;
      for (int64_t c = 0; c < kSize; ++c) {
        const double value = transposed ? y.at(c, r) : y.at(r, c);
        if (scale == 0) {
          ASSERT_EQ(value, 0) << "at " << r << ", " << c;
          continue;
        }
        // y is rounded to eight bits: a code of three digits is at most a quarter off.
        const double code = std::rint(value / (kRoot * scale));
        ASSERT_LE(std::abs(code - in_runs.at(r, c) / scale), 0.501) << "at " << r << ", " << c;
      }
    }
  };
  for (const LinearDType dtype : backend().linear_dtypes()) {
    if (dtype == LinearDType::kNative) continue;
    SCOPED_TRACE(name_of(dtype));
    const std::unique_ptr<PackedLinear> one = pack(signs(kSize), dtype);
    const std::unique_ptr<PackedLinear> weight = pack(values, dtype);
    const DeviceMatrix ones = matrix(act(), signs(kSize));
    const DeviceMatrix x = matrix(act(), values);
    const DeviceMatrix y = matrix(out(), kSize, kSize);
    backend().linear(ones.view(), *weight, y.view());
    expect_codes(y.read(), true);
    backend().linear(x.view(), *one, y.view());
    expect_codes(y.read(), false);
    const DeviceMatrix few = matrix(out(), 16, kSize);
    backend().linear(x.view().rows_from(0, 16), *one, few.view());
    expect_codes(few.read(), false);
  }
}

/// A column three hundred times the others, as models have them, which a scale alone would leave
/// nothing of: weights do not look at it, so that the others make up the product.
TEST_P(LinearDTypeOps, AnOutlierLeavesTheOthersSeen) {
  constexpr int64_t kIn = 512;
  Matrix weight = reference::random_matrix(64, kIn, 1.0, 1);
  for (int64_t r = 0; r < weight.rows; ++r) weight.at(r, 77) = 0.0;
  weight = rounded(weight, DType::kBF16);
  Matrix values = reference::random_matrix(40, kIn, 1.0, 2);
  for (int64_t r = 0; r < values.rows; ++r) values.at(r, 77) = 300.0;
  for (const LinearDType dtype : backend().linear_dtypes()) {
    SCOPED_TRACE(name_of(dtype));
    const DeviceMatrix x = matrix(act(), values);
    const DeviceMatrix y = matrix(out(), values.rows, weight.rows);
    backend().linear(x.view(), *pack(weight, dtype), y.view());
    const Matrix got = y.read();
    const Matrix want = reference::linear(x.read(), weight);
    double squares = 0;
    double errors = 0;
    for (size_t i = 0; i < want.values.size(); ++i) {
      squares += want.values[i] * want.values[i];
      errors += std::pow(got.values[i] - want.values[i], 2);
    }
    // The outlier is 13 in every column of its run: weights, off by 0.75 %, times that are most of
    // the error, 0.17 of the others' share. A column alone would have steps of 300 / 127: 1.
    EXPECT_LT(std::sqrt(errors / squares), 0.35);
  }
}

TEST_P(LinearDTypeOps, ARowThatIsNotFiniteStaysAlone) {
  const Matrix weight = reference::random_matrix(32, 64, 0.5, 1);
  Matrix values = reference::random_matrix(20, 64, 2.0, 2);
  values.at(1, 5) = std::numeric_limits<double>::infinity();
  values.at(2, 60) = std::numeric_limits<double>::quiet_NaN();
  for (const LinearDType dtype : backend().linear_dtypes()) {
    for (const int64_t rows : {4, 20}) {
      SCOPED_TRACE(testing::Message() << name_of(dtype) << " " << rows);
      const DeviceMatrix x(backend(), act(), values);
      const DeviceMatrix y = matrix(out(), rows, 32);
      backend().linear(x.view().rows_from(0, rows), *pack(weight, dtype), y.view());
      const Matrix got = y.read();
      for (int64_t r = 0; r < rows; ++r) {
        for (const double value : got.row(r)) {
          ASSERT_EQ(std::isfinite(value), r != 1 && r != 2) << "row " << r;
        }
      }
    }
  }
}

TEST_P(LinearDTypeOps, SiluMulAtOnceIsThatOfTheProduct) {
  for (const LinearDType dtype : backend().linear_dtypes()) {
    if (dtype == LinearDType::kNative) continue;
    for (const auto& [in, inner] : {std::pair{64, 16}, {576, 112}, {1000, 36}, {4096, 77}}) {
      const double unit =
          1.0 / std::sqrt(static_cast<double>(in));  // so that gates are of all sizes
      const std::unique_ptr<PackedLinear> packed =
          pack(reference::random_matrix(2 * inner, in, 8 * unit, 1), dtype);
      for (const int64_t rows : {1, 8, 9, 16, 17}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << in << " x 2 * " << inner);
        silu_mul_at_once(*packed, rows);
      }
    }
  }
}

/// Tiles of every size and more of them than a device takes at once; a few rows are looked at.
TEST_P(LinearDTypeOps, ManyRowsAndOutputs) {
  for (const auto& [rows, in, out_features] :
       {std::tuple{17, 128, 16900}, {2500, 192, 2000}, {700, 4096, 72}}) {
    const Matrix weight = rounded(reference::random_matrix(out_features, in, 0.5, 1), DType::kBF16);
    const Matrix distinct = rounded(reference::random_matrix(100, in, 2.0, 2), DType::kBF16);
    Matrix values(rows, in);
    for (int64_t r = 0; r < rows; ++r) copy_row(distinct, r % 100, values, r);
    for (const LinearDType dtype : backend().linear_dtypes()) {
      if (dtype == LinearDType::kNative) continue;
      SCOPED_TRACE(testing::Message() << rows << " x " << in << " x " << out_features);
      const DeviceMatrix x = matrix(act(), values);
      const DeviceMatrix y = matrix(out(), rows, out_features);
      backend().linear(x.view(), *pack(weight, dtype), y.view());
      const Matrix all = y.read();
      const int64_t last = rows - 1;
      const std::vector<int64_t> some = {0, 16, last / 3, last / 2, last - 5, last};
      expect_linear(rows_of(all, some), rows_of(values, some), weight, {});
      for (int64_t r = 100; r < rows; ++r) {  // whatever tile a row is in
        ASSERT_TRUE(std::equal(all.row(r).begin(), all.row(r).end(), all.row(r % 100).begin()))
            << "row " << r;
      }
    }
  }
}

/// More rows than a device may have room for in another dtype, of more columns than a thread block
/// keeps; all are one row of memory.
TEST_P(LinearDTypeOps, MoreRowsThanThereIsRoomFor) {
  constexpr int64_t kIn = 24576;
  constexpr int64_t kRows = 6000;
  const Matrix weight = rounded(reference::random_matrix(16, kIn, 0.5, 1), DType::kBF16);
  for (const LinearDType dtype : backend().linear_dtypes()) {
    if (dtype == LinearDType::kNative) continue;
    const DeviceMatrix x = matrix(act(), reference::random_matrix(1, kIn, 2.0, 2));
    const DeviceMatrix y = matrix(out(), kRows, 16);
    MatrixView many = x.view();
    many.rows = kRows;
    many.stride = 0;
    backend().linear(many, *pack(weight, dtype), y.view());
    const Matrix all = y.read();
    const std::vector<int64_t> first = {0};
    expect_linear(rows_of(all, first), x.read(), weight, {});
    for (int64_t r = 1; r < kRows; ++r) {
      ASSERT_TRUE(std::equal(all.row(r).begin(), all.row(r).end(), all.row(0).begin()))
          << "row " << r;
    }
  }
}

}  // namespace
}  // namespace longspan
