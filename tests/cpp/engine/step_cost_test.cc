#include "engine/step_cost.h"

#include <gtest/gtest.h>

namespace longspan {
namespace {

ModelConfig small_llama() {
  ModelConfig c;
  c.num_layers = 30;
  c.hidden_size = 576;
  c.intermediate_size = 1536;
  c.num_heads = 9;
  c.num_kv_heads = 3;
  c.head_dim = 64;
  return c;
}

TEST(StepCost, CountsTheArithmeticOfAChunk) {
  const StepCost cost(small_llama(), 5e10);
  // 2 x 106,168,320 weights of linears per token; 4 x 30 x 9 x 64 per pair, T^2 / 2 pairs.
  EXPECT_DOUBLE_EQ(cost.flops(1000, 0), 1000 * 2.0 * 106168320 + 69120.0 * 500000);
  // Chunks add up to the whole.
  EXPECT_NEAR(cost.flops(600, 0) + cost.flops(400, 600), cost.flops(1000, 0), 1.0);
}

TEST(StepCost, ChunksShrinkAsTheContextGrowsAndTheMachineSlows) {
  StepCost cost(small_llama(), 5e10);
  for (int i = 0; i < 50; ++i) cost.measured(2e12, 1.0);
  EXPECT_EQ(cost.fitting_tokens(512, 0), 512);
  const int64_t far = cost.fitting_tokens(512, 1000000);
  EXPECT_LT(far, 512);
  EXPECT_GE(far, 32);
  for (int i = 0; i < 50; ++i) cost.measured(2e10, 1.0);
  EXPECT_LT(cost.fitting_tokens(512, 0), 512);
  EXPECT_EQ(cost.fitting_tokens(40, 1000000), 40);
}

TEST(StepCost, ChunksNeverShrinkBelowWhatKeepsTheDeviceBusy) {
  StepCost cost(small_llama(), 5e10, 1.0, 200);
  for (int i = 0; i < 50; ++i) {
    const int64_t tokens = cost.fitting_tokens(512, 10'000'000);
    ASSERT_EQ(tokens, 200);
    cost.measured(cost.flops(tokens, 10'000'000), 1e3);
  }
  EXPECT_EQ(cost.fitting_tokens(40, 10'000'000), 40);
}

TEST(StepCost, ChunksThatTimeCutsShortAreWholeRoundsOfTheDevice) {
  const StepCost cost(small_llama(), 1e14, 1.0, 512);
  int64_t last = 8448;
  for (int64_t position = 0; position < 1'000'000; position += last) {
    last = cost.fitting_tokens(8448, position);
    if (last == 8448) continue;
    EXPECT_EQ(last % 512, 0);
    EXPECT_TRUE(last == 512 || cost.flops(last, position) <= 1e14);
    EXPECT_GT(cost.flops(last + 512, position), 1e14);  // no more would have fitted
  }
  EXPECT_EQ(last, 1024);
}

}  // namespace
}  // namespace longspan
