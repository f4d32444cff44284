#include <algorithm>
#include <vector>

#include "backend/device.h"

namespace longspan {
namespace {

using reference::Matrix;

class RowOps : public Ops {};
LONGSPAN_TEST_DEVICES(RowOps);

constexpr int64_t kRows[] = {1, 3, 70};
constexpr int64_t kCols[] = {1, 8, 33, 64, 100, 576, 2048, 4096, 16384};

TEST_P(RowOps, WhatIsUploadedIsDownloaded) {
  for (const DType dtype : {act(), out(), acc()}) {
    for (const int64_t cols : kCols) {
      const Matrix values = reference::random_matrix(5, cols, 4.0, 1);
      EXPECT_EQ(matrix(dtype, values).read().values, rounded(values, dtype).values) << cols;
    }
  }
}

TEST_P(RowOps, RmsNormAddsAndNorms) {
  for (const int64_t rows : kRows) {
    for (const int64_t cols : kCols) {
      SCOPED_TRACE(testing::Message() << rows << " x " << cols);
      const auto seed = static_cast<uint64_t>(rows + cols);
      const DeviceMatrix residual = matrix(acc(), reference::random_matrix(rows, cols, 3.0, seed));
      const DeviceMatrix delta = matrix(out(), reference::random_matrix(rows, cols, 2.0, seed + 1));
      const Matrix weight = reference::random_matrix(1, cols, 1.5, seed + 2);
      const Buffer packed = pack_vector(weight);
      const DeviceMatrix normed = matrix(act(), rows, cols);
      Matrix sum = residual.read();
      const auto norm = [&](const MatrixView* added) {
        backend().rms_norm(added, residual.view(), packed, 1e-5f, normed.view());
        EXPECT_EQ(residual.read().values, sum.values);
        expect_close(normed.read(), reference::rms_norm(sum, weight.row(0), double{1e-5f}),
                     2e-6 + rounding_of(act()), 1e-30);
      };
      norm(nullptr);
      const Matrix added = delta.read();
      for (size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += added.values[i];
      sum = rounded(sum, acc());
      norm(&delta.view());
    }
  }
}

TEST_P(RowOps, SiluMul) {
  for (const int64_t rows : kRows) {
    for (const int64_t cols : kCols) {
      SCOPED_TRACE(testing::Message() << rows << " x " << cols);
      const DeviceMatrix gate_up = matrix(out(), reference::random_matrix(rows, 2 * cols, 30.0, 4));
      const DeviceMatrix product = matrix(act(), rows, cols);
      backend().silu_mul(gate_up.view(), product.view());
      expect_close(product.read(), reference::silu_mul(gate_up.read()), 2e-6 + rounding_of(act()),
                   1e-30);
    }
  }
}

TEST_P(RowOps, GatherRows) {
  for (const DType dtype : {act(), acc()}) {
    for (const int64_t cols : kCols) {
      const DeviceMatrix in = matrix(dtype, reference::random_matrix(9, cols, 4.0, 1));
      const std::vector<int64_t> rows = {8, 0, 3, 3, 7};
      const DeviceMatrix gathered = matrix(dtype, 5, cols);
      backend().gather_rows(in.view(), rows, gathered.view());
      const Matrix from = in.read();
      const Matrix to = gathered.read();
      for (int64_t i = 0; i < to.rows; ++i) {
        EXPECT_TRUE(std::ranges::equal(to.row(i), from.row(rows[static_cast<size_t>(i)]))) << i;
      }
    }
  }
}

TEST_P(RowOps, Embedding) {
  constexpr int64_t kVocabulary = 300;
  for (const int64_t cols : {8, 64, 100, 576}) {
    const Matrix table = rounded(reference::random_matrix(kVocabulary, cols, 2.0, 5), DType::kBF16);
    const std::unique_ptr<PackedLinear> packed = pack(table);
    const KvShape kv{1, 1, 8, 64};
    KvCache cache{backend().allocate(backend().kv_block_bytes(kv)), kv, 1,
                  backend().kv_block_bytes(kv)};
    const std::unique_ptr<StepPlan> plan = backend().make_step_plan({64, 1, 1}, {1, 1, 8});
    auto profile = std::make_shared<RopeProfile>();
    profile->inv_freq = {1.0, 0.1, 0.01, 0.001};
    StepInput input{{299, 0, 7, 7, 150, 31}, {0, 6}, {0}, {{0}}, {profile}};
    backend().plan_step(*plan, input, cache);
    const DeviceMatrix embedded = matrix(acc(), input.num_tokens(), cols);
    backend().embedding(*plan, *packed, 0, embedded.view());
    const Matrix got = embedded.read();
    // As a table that begins at token 31 has it: of what it lacks, zeros.
    backend().embedding(*plan, *packed, 31, embedded.view());
    const Matrix moved = embedded.read();
    const std::vector<double> zeros(static_cast<size_t>(cols));
    for (int64_t t = 0; t < got.rows; ++t) {
      const int32_t id = input.token_ids[static_cast<size_t>(t)];
      EXPECT_TRUE(std::ranges::equal(got.row(t), table.row(id))) << t;
      if (id < 31) {
        EXPECT_TRUE(std::ranges::equal(moved.row(t), zeros)) << t;
      } else {
        EXPECT_TRUE(std::ranges::equal(moved.row(t), table.row(id - 31))) << t;
      }
    }
  }
}

}  // namespace
}  // namespace longspan
