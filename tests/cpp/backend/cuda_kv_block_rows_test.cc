#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "backend/cuda/kv_block_rows.h"
#include "backend/cuda/kv_layout.h"
#include "backend/kv_rows.h"

namespace longspan::cuda {
namespace {

/// Makes keys codes of int6 whose lower four bits are not all zero, nor their upper two.
void make_int6(const KvRows& rows, std::vector<std::byte>& data) {
  const KvShape& shape = rows.shape();
  const int64_t keys = shape.num_layers * shape.num_kv_heads * rows.head_bytes(KvPart::kKeys);
  for (std::byte& b : std::span(data).first(static_cast<size_t>(keys))) {
    const int magnitude = 17 + std::to_integer<int>(b) % 8 * 2;
    b = static_cast<std::byte>(std::to_integer<int>(b & std::byte{8}) == 0 ? magnitude
                                                                           : -magnitude);
  }
}

/// Rows come back from a block as they went into it, and nothing else of it is left.
TEST(CudaKvBlockRows, GoToABlockAndBack) {
  std::mt19937 random(1);
  for (const KvFormat format : {KvFormat::kNative, KvFormat::kInt8, KvFormat::kFp8,
                                KvFormat::kInt8Fp8, KvFormat::kInt8Int4, KvFormat::kInt4}) {
    for (const int64_t head_dim : {24, 64, 80, 128, 256}) {
      for (const int64_t tokens : {1, 63, 64, 100, 128}) {
        SCOPED_TRACE(testing::Message() << name_of(format) << " " << head_dim << " " << tokens);
        const KvShape shape = {2, 3, head_dim, 128, format};
        const KvRows layout_of_rows(shape, DType::kBF16, tokens);
        std::vector<std::byte> rows(static_cast<size_t>(layout_of_rows.bytes()));
        for (std::byte& b : rows) b = static_cast<std::byte>(1 + random() % 255);
        if (format == KvFormat::kInt4) make_int6(layout_of_rows, rows);
        std::vector<char> block(static_cast<size_t>(KvLayout::of(shape).block_bytes), '\x5a');
        block_of_rows(shape, rows, tokens, block.data());
        // Four codes of int6 are three bytes.
        const int64_t spared = format == KvFormat::kInt4 ? 6 * tokens * head_dim / 4 : 0;
        EXPECT_EQ(std::ranges::count_if(block, [](char c) { return c != 0; }),
                  std::ssize(rows) - spared);
        std::vector<std::byte> back(rows.size());
        rows_of_block(shape, block.data(), tokens, back);
        EXPECT_EQ(back, rows);
      }
    }
  }
}

}  // namespace
}  // namespace longspan::cuda
