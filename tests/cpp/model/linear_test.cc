#include "model/linear.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "backend/registry.h"
#include "model/shard.h"

namespace longspan {
namespace {

/// A random float32 matrix that stays put.
struct Matrix {
  Matrix(int64_t rows, int64_t cols) : values(static_cast<size_t>(rows * cols)), cols(cols) {
    for (float& value : values) value = normal(random);
  }
  WeightView view() {
    return {values.data(), DType::kF32, std::ssize(values) / cols, cols, cols, "test"};
  }
  inline static std::mt19937 random{5};
  inline static std::normal_distribution<float> normal;
  std::vector<float> values;
  int64_t cols;
};

/// An activation: stride a multiple of 32.
struct Activation {
  Activation(Backend& backend, int64_t rows, int64_t cols)
      : stride((cols + 31) / 32 * 32), buffer(backend.allocate(rows * stride * 4)) {
    view = {buffer.data(), DType::kF32, rows, cols, stride};
  }
  int64_t stride;
  Buffer buffer;
  MatrixView view;
};

constexpr int64_t kTokens = 3;
constexpr int64_t kIn = 24;
constexpr int64_t kOut = 18;

class ParallelLinear : public testing::Test {
 protected:
  ParallelLinear() : x_(*backend_, kTokens, kIn) {
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t i = 0; i < kIn; ++i) x_.view.row<float>(t)[i] = Matrix::normal(Matrix::random);
    }
  }

  const std::unique_ptr<Backend> backend_ = make_backend("cpu", "float32", 1);
  Activation x_;
  // Two parts along the rows, as a packed checkpoint has.
  Matrix first_{7, kIn};
  Matrix second_{kOut - 7, kIn};
  Matrix first_bias_{1, 7};
  Matrix second_bias_{1, kOut - 7};
  const LinearTensors tensors_{{first_.view(), second_.view()},
                               {first_bias_.view(), second_bias_.view()}};

  double expected(int64_t token, int64_t out) {
    Matrix& weight = out < 7 ? first_ : second_;
    Matrix& bias = out < 7 ? first_bias_ : second_bias_;
    const int64_t row = out < 7 ? out : out - 7;
    double sum = bias.values[static_cast<size_t>(row)];
    for (int64_t i = 0; i < kIn; ++i) {
      sum += static_cast<double>(x_.view.row<float>(token)[i]) *
             weight.values[static_cast<size_t>(row * kIn + i)];
    }
    return sum;
  }
};

TEST_F(ParallelLinear, ColumnsOfAllRanksMakeTheWhole) {
  for (const int size : {1, 2, 3}) {
    for (int rank = 0; rank < size; ++rank) {
      const LinearTensors mine = slice_rows(tensors_, share_of(kOut, rank, size));
      const LinearTensors* fused[] = {&mine, &mine};
      const ColumnParallelLinear linear(*backend_, fused, LinearDType::kNative);
      const int64_t share = kOut / size;
      const Activation y(*backend_, kTokens, 2 * share);
      linear.forward(*backend_, x_.view, y.view);
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t i = 0; i < 2 * share; ++i) {
          EXPECT_NEAR(y.view.row<float>(t)[i], expected(t, rank * share + i % share), 1e-4);
        }
      }
    }
  }
}

TEST_F(ParallelLinear, RowsOfAllRanksAddToTheWhole) {
  for (const int size : {1, 2, 3}) {
    std::vector<double> sum(kTokens * kOut, 0.0);
    for (int rank = 0; rank < size; ++rank) {
      const LinearTensors columns = slice_cols(tensors_, share_of(kIn, rank, size), rank == 0);
      const RowParallelLinear linear(*backend_, columns, LinearDType::kNative);
      const int64_t share = kIn / size;
      const Activation mine(*backend_, kTokens, share);
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t i = 0; i < share; ++i) {
          mine.view.row<float>(t)[i] = x_.view.row<float>(t)[rank * share + i];
        }
      }
      const Activation y(*backend_, kTokens, kOut);
      linear.forward(*backend_, mine.view, y.view);
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t i = 0; i < kOut; ++i) sum[t * kOut + i] += y.view.row<float>(t)[i];
      }
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t i = 0; i < kOut; ++i) {
        EXPECT_NEAR(sum[t * kOut + i], expected(t, i), 1e-4);
      }
    }
  }
}

}  // namespace
}  // namespace longspan
