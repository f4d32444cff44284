#include "backend/cpu/rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "reference/reference.h"

namespace longspan::cpu {
namespace {

constexpr unsigned char kFill = 0xa5;  // what a gap holds before an op and must hold after

/// Memory of a matrix whose rows lie padded(cols) + 32 apart, every byte kFill.
class Storage {
 public:
  Storage(DType dtype, int64_t rows, int64_t cols)
      : dtype_(dtype), rows_(rows), cols_(cols), stride_((cols + 31) / 32 * 32 + 32) {
    bytes_.assign(static_cast<size_t>(rows * stride_ * size_of(dtype)), kFill);
  }
  Storage(DType dtype, const reference::Matrix& values) : Storage(dtype, values.rows, values.cols) {
    reference::write(values, view());
  }
  MatrixView view() { return {bytes_.data(), dtype_, rows_, cols_, stride_}; }
  bool gaps_untouched() const {
    const int64_t stride = stride_ * size_of(dtype_);
    const int64_t used = cols_ * size_of(dtype_);
    for (int64_t i = 0; i < static_cast<int64_t>(bytes_.size()); ++i) {
      if (i % stride >= used && bytes_[static_cast<size_t>(i)] != kFill) return false;
    }
    return true;
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  DType dtype_;
  int64_t rows_;
  int64_t cols_;
  int64_t stride_;
  std::vector<unsigned char> bytes_;
};

/// |got - expected| within relative * |expected| + absolute, and for bfloat16 the rounding of the
/// result besides: half a unit of its 8-bit significand.
void expect_close(const reference::Matrix& got, const reference::Matrix& expected, DType dtype,
                  double relative, double absolute = 1e-37) {
  const double bound = relative + (dtype == DType::kBF16 ? 0x1p-8 : 0.0);
  for (int64_t r = 0; r < expected.rows; ++r) {
    for (int64_t c = 0; c < expected.cols; ++c) {
      ASSERT_LE(std::abs(got.at(r, c) - expected.at(r, c)),
                bound * std::abs(expected.at(r, c)) + absolute)
          << "at " << r << ", " << c << ": " << got.at(r, c) << " vs " << expected.at(r, c);
    }
  }
}

/// Every instruction set of this CPU with either activation dtype.
class Rows : public testing::TestWithParam<std::tuple<const InstructionSet*, DType>> {
 protected:
  DType dtype() const { return std::get<DType>(GetParam()); }
  const Kernels& kernels() const {
    const InstructionSet& set = *std::get<const InstructionSet*>(GetParam());
    return dtype() == DType::kBF16 ? set.bf16 : set.f32;
  }
};

constexpr int64_t kSizes[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 576, 1537, 4096};

TEST_P(Rows, RmsNormMatchesTheReference) {
  ThreadPool pool(2);
  for (const int64_t cols : kSizes) {
    for (const bool with_delta : {false, true}) {
      const auto seed = static_cast<uint64_t>(cols);
      reference::Matrix sum = reference::random_matrix(5, cols, 3.0, seed);
      const reference::Matrix added = reference::random_matrix(5, cols, 2.0, seed + 1);
      const reference::Matrix weight = reference::random_matrix(1, cols, 1.5, seed + 2);
      Storage residual(DType::kF32, sum);
      Storage delta(DType::kF32, added);
      Storage scale(DType::kF32, weight);
      Storage out(dtype(), 5, cols);
      const MatrixView delta_view = delta.view();
      rms_norm(kernels(), pool, with_delta ? &delta_view : nullptr, residual.view(),
               scale.view().row<const float>(0), 1e-5f, out.view());
      if (with_delta) {
        for (size_t i = 0; i < sum.values.size(); ++i) {
          sum.values[i] = static_cast<float>(sum.values[i]) + static_cast<float>(added.values[i]);
          sum.values[i] = static_cast<float>(sum.values[i]);
        }
      }
      EXPECT_EQ(reference::read(residual.view()).values, sum.values) << cols;
      expect_close(reference::read(out.view()),
                   reference::rms_norm(sum, weight.row(0), double{1e-5f}), dtype(), 1e-6);
      EXPECT_TRUE(out.gaps_untouched() && residual.gaps_untouched()) << cols;
    }
  }
}

TEST_P(Rows, RmsNormOfExtremes) {
  ThreadPool pool(1);
  for (const float magnitude : {0.0f, 1e-18f, 1e15f}) {
    const reference::Matrix x = reference::random_matrix(2, 65, magnitude, 9);
    reference::Matrix weight(1, 65);
    std::fill(weight.values.begin(), weight.values.end(), 1.0);
    Storage residual(DType::kF32, x);
    Storage scale(DType::kF32, weight);
    Storage out(dtype(), 2, 65);
    rms_norm(kernels(), pool, nullptr, residual.view(), scale.view().row<const float>(0), 1e-6f,
             out.view());
    expect_close(reference::read(out.view()), reference::rms_norm(x, weight.row(0), double{1e-6f}),
                 dtype(), 1e-6);
  }
}

TEST_P(Rows, SiluMulMatchesTheReference) {
  ThreadPool pool(2);
  for (const int64_t cols : kSizes) {
    for (const double scale : {0.01, 5.0, 80.0}) {
      const reference::Matrix x =
          reference::random_matrix(3, 2 * cols, scale, static_cast<uint64_t>(cols));
      Storage gate_up(DType::kF32, x);
      Storage out(dtype(), 3, cols);
      silu_mul(kernels(), pool, gate_up.view(), out.view());
      expect_close(reference::read(out.view()), reference::silu_mul(x), dtype(), 1e-6, 1e-30);
      EXPECT_TRUE(out.gaps_untouched()) << cols;
    }
  }
}

TEST_P(Rows, SiluOfExtremes) {
  ThreadPool pool(1);
  const std::vector<double> gates = {0.0,   -0.0,   1e-30,  -1e-30, 20.0, -20.0,
                                     87.0,  -87.0,  88.5,   -88.5,  89.0, -89.0,
                                     104.0, -104.0, 1000.0, -1000,  1e30, -1e30};
  const auto cols = static_cast<int64_t>(gates.size());
  reference::Matrix x(1, 2 * cols);
  for (int64_t c = 0; c < cols; ++c) {
    x.at(0, c) = static_cast<float>(gates[static_cast<size_t>(c)]);
    x.at(0, cols + c) = 1.0;
  }
  Storage gate_up(DType::kF32, x);
  Storage out(dtype(), 1, cols);
  silu_mul(kernels(), pool, gate_up.view(), out.view());
  expect_close(reference::read(out.view()), reference::silu_mul(x), dtype(), 1e-6, 1e-35);
}

TEST_P(Rows, NotANumberStaysVisible) {
  ThreadPool pool(1);
  for (const float bad : {std::nanf(""), INFINITY}) {
    reference::Matrix x = reference::random_matrix(1, 80, 1.0, 4);
    x.values[19] = bad;
    Storage gate_up(DType::kF32, 1, 80);
    for (int64_t c = 0; c < 80; ++c)
      gate_up.view().row<float>(0)[c] = static_cast<float>(x.at(0, c));
    Storage activated(dtype(), 1, 40);
    silu_mul(kernels(), pool, gate_up.view(), activated.view());
    EXPECT_FALSE(std::isfinite(reference::read(activated.view()).at(0, 19)));

    Storage normed(dtype(), 1, 80);
    const std::vector<float> weight(80, 1.0f);
    rms_norm(kernels(), pool, nullptr, gate_up.view(), weight.data(), 1e-5f, normed.view());
    EXPECT_TRUE(std::isnan(reference::read(normed.view()).at(0, 19)));
  }
}

TEST_P(Rows, BatchAndThreadsChangeNoBit) {
  constexpr int64_t kRows = 37;
  for (const int64_t cols : {33, 576, 1537}) {
    const reference::Matrix x = reference::random_matrix(kRows, 2 * cols, 4.0, 77);
    const std::vector<float> weight(static_cast<size_t>(2 * cols), 0.7f);
    const auto run = [&](int threads, int64_t rows_at_once) {
      ThreadPool pool(threads);
      Storage in(DType::kF32, x);
      Storage residual(DType::kF32, x);
      Storage activated(dtype(), kRows, cols);
      Storage normed(dtype(), kRows, 2 * cols);
      for (int64_t first = 0; first < kRows; first += rows_at_once) {
        const int64_t count = std::min(rows_at_once, kRows - first);
        silu_mul(kernels(), pool, in.view().rows_from(first, count),
                 activated.view().rows_from(first, count));
        const MatrixView delta = in.view().rows_from(first, count);
        rms_norm(kernels(), pool, &delta, residual.view().rows_from(first, count), weight.data(),
                 1e-5f, normed.view().rows_from(first, count));
      }
      return std::pair(activated.bytes(), normed.bytes());
    };
    const auto expected = run(1, kRows);
    EXPECT_EQ(run(1, 1), expected);
    EXPECT_EQ(run(2, kRows), expected);
    EXPECT_EQ(run(4, 5), expected);
  }
}

TEST_P(Rows, GathersRows) {
  ThreadPool pool(2);
  const reference::Matrix x = reference::random_matrix(9, 33, 4.0, 1);
  Storage in(dtype(), x);
  Storage out(dtype(), 5, 33);
  const std::vector<int64_t> rows = {8, 0, 3, 3, 7};
  gather_rows(pool, in.view(), rows, out.view());
  for (int64_t i = 0; i < 5; ++i) {
    for (int64_t c = 0; c < 33; ++c) {
      ASSERT_EQ(reference::read(out.view()).at(i, c),
                reference::read(in.view()).at(rows[static_cast<size_t>(i)], c));
    }
  }
  EXPECT_TRUE(out.gaps_untouched());
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, Rows,
                         testing::Combine(testing::ValuesIn(available_instruction_sets().begin(),
                                                            available_instruction_sets().end()),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         [](const testing::TestParamInfo<Rows::ParamType>& info) {
                           std::string name(std::get<const InstructionSet*>(info.param)->name);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name + "_" + std::string(name_of(std::get<DType>(info.param)));
                         });

TEST(Download, PacksRows) {
  ThreadPool pool(2);
  const reference::Matrix x = reference::random_matrix(11, 37, 4.0, 1);
  Storage in(DType::kF32, x);
  std::vector<float> out(11 * 37 + 1, 5.0f);
  download(pool, in.view(), out.data());
  EXPECT_TRUE(std::equal(x.values.begin(), x.values.end(), out.begin()));
  EXPECT_EQ(out.back(), 5.0f);
}

}  // namespace
}  // namespace longspan::cpu
