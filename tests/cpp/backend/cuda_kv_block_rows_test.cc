#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "backend/cuda/kv_block_rows.h"
#include "backend/cuda/kv_layout.h"
#include "backend/kv_rows.h"

namespace longspan::cuda {
namespace {

/// Rows come back from a block as they went into it, and nothing else of it is left.
TEST(CudaKvBlockRows, GoToABlockAndBack) {
  std::mt19937 random(1);
  for (const KvFormat format : {KvFormat::kNative, KvFormat::kInt8, KvFormat::kFp8,
                                KvFormat::kInt8Fp8, KvFormat::kInt8Int4, KvFormat::kInt4}) {
    for (const int64_t head_dim : {24, 64, 80, 128, 256}) {
      for (const int64_t tokens : {1, 63, 64, 100, 128}) {
        SCOPED_TRACE(testing::Message() << name_of(format) << " " << head_dim << " " << tokens);
        const KvShape shape = {2, 3, head_dim, 128, format};
        std::vector<std::byte> rows(
            static_cast<size_t>(KvRows(shape, DType::kBF16, tokens).bytes()));
        for (std::byte& b : rows) b = static_cast<std::byte>(1 + random() % 255);
        std::vector<char> block(static_cast<size_t>(KvLayout::of(shape).block_bytes), '\x5a');
        block_of_rows(shape, rows, tokens, block.data());
        EXPECT_EQ(std::ranges::count_if(block, [](char c) { return c != 0; }), std::ssize(rows));
        std::vector<std::byte> back(rows.size());
        rows_of_block(shape, block.data(), tokens, back);
        EXPECT_EQ(back, rows);
      }
    }
  }
}

}  // namespace
}  // namespace longspan::cuda
