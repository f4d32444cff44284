#include "backend/cpu/copy_kv_block.h"

#include <gtest/gtest.h>

#include <cstring>

#include "backend/attention_harness.h"

namespace longspan::cpu {
namespace {

/// A sequence goes on from another's block that agrees in its first tokens and holds no numbers
/// after them, in a pool full of NaN: the same bits as when it computes every token.
void expect_copies(const InstructionSet& set, DType dtype, KvFormat format, int64_t block_len) {
  const Kernels& kernels = dtype == DType::kF32 ? set.f32 : set.bf16;
  for (const int64_t shared : {int64_t{1}, int64_t{33}, block_len / 2, block_len - 1}) {
    SCOPED_TRACE(testing::Message() << set.name << " " << name_of(dtype) << " " << name_of(format)
                                    << ", " << shared << " of a block of " << block_len);
    AttentionHarness harness(kernels, dtype, {4, 2, 20}, block_len, 2, 300, 300, 4, format);
    harness.poison();
    const int64_t length = block_len + 30;
    const int64_t source = harness.add_sequence(length, 10000.0, 1.0, 5);
    const int64_t cold = harness.add_sequence(length, 10000.0, 1.0, 5);
    const int64_t warm = harness.add_sequence(length, 10000.0, 1.0, 5);
    harness.edit(source, [&](int64_t row, int64_t, double value) {
      return row < shared ? value : std::numeric_limits<double>::quiet_NaN();
    });
    harness.step({{source, 0, block_len}}, false);
    const reference::Matrix expected = harness.step({{cold, 0, length}});
    harness.copy_first_block(source, warm, shared);
    const reference::Matrix got = harness.step({{warm, shared, length - shared}});
    for (int64_t r = 0; r < got.rows; ++r) {
      for (int64_t c = 0; c < got.cols; ++c) {
        ASSERT_EQ(got.at(r, c), expected.at(shared + r, c)) << r << " " << c;
      }
    }
  }
}

TEST(CopyKvBlock, GoesOnBitForBitWhateverFollowsInTheSource) {
  for (const InstructionSet* set : available_instruction_sets()) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      for (const int64_t block_len : {64, 128, 256}) {
        for (const KvFormat format : {KvFormat::kNative, KvFormat::kInt8, KvFormat::kFp8,
                                      KvFormat::kInt8Fp8, KvFormat::kInt8Int4, KvFormat::kInt4}) {
          expect_copies(*set, dtype, format, block_len);
        }
      }
    }
  }
}

TEST(CopyKvBlock, CopiesEveryLayerAndHead) {
  KvCache cache;
  cache.shape = {3, 2, 80, 128};
  cache.num_blocks = 2;
  cache.block_bytes = KvTiles(cache.shape, DType::kBF16).block_bytes();
  cache.pool = allocate_host(2 * cache.block_bytes);
  char* bytes = cache.pool.as<char>();
  std::mt19937 random(1);
  for (int64_t i = 0; i < cache.block_bytes; ++i) bytes[i] = static_cast<char>(random());
  ThreadPool pool(2);
  copy_kv_block(pool, cache, DType::kBF16, 0, 1, 128);
  const KvTiles tiles(cache.shape, DType::kBF16);
  const int32_t from = 0;
  const int32_t to = 1;
  for (int64_t layer = 0; layer < 3; ++layer) {
    for (int64_t head = 0; head < 2; ++head) {
      for (int64_t tile = 0; tile < 2; ++tile) {
        EXPECT_EQ(std::memcmp(bytes + tiles.k_offset(&from, tile, layer, head),
                              bytes + tiles.k_offset(&to, tile, layer, head),
                              static_cast<size_t>(tiles.k().bytes)),
                  0);
        EXPECT_EQ(std::memcmp(bytes + tiles.v_offset(&from, tile, layer, head),
                              bytes + tiles.v_offset(&to, tile, layer, head),
                              static_cast<size_t>(tiles.v().bytes)),
                  0);
      }
    }
  }
}

}  // namespace
}  // namespace longspan::cpu
