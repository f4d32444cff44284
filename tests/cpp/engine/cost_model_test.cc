#include "engine/cost_model.h"

#include <gtest/gtest.h>

#include <memory>
#include <span>
#include <string>

namespace longspan {
namespace {

/// What times depend on of the CUDA library's sizes; the library need not be built.
class GpuSizes final : public BackendSizes {
 public:
  std::string describe() const override { return "a GPU"; }
  DType activation_dtype() const override { return DType::kBF16; }
  DType output_dtype() const override { return DType::kBF16; }
  DType accumulator_dtype() const override { return DType::kF32; }
  DeviceTraits traits() const override { return {.flops_per_second = 1e14, .step_seconds = 0.6}; }
  std::span<const LinearDType> linear_dtypes() const override { return {}; }
  int64_t packed_linear_bytes(int64_t out, int64_t in, LinearDType) const override {
    return 2 * out * in;
  }
  int64_t linear_workspace_bytes(LinearDType) const override { return 0; }
  std::span<const KvFormat> kv_formats(int64_t) const override { return {}; }
  std::span<const PrefillAttention> prefill_attentions(int64_t) const override { return {}; }
  int64_t kv_block_bytes(const KvShape& s) const override {
    return s.num_layers * s.num_kv_heads * s.block_len * 2 * s.head_dim * 2;
  }
  int64_t step_plan_bytes(const StepLimits&, const AttentionShape&) const override { return 0; }
  int64_t least_prefill_tokens(const StepLimits&, const AttentionShape& shape) const override {
    return (131 + shape.num_heads) / shape.num_heads * 128;
  }
};

/// InternLM2.5-7B's shape on so many H100s.
class Costs {
 public:
  explicit Costs(int tp, const Cluster& cluster = {}) {
    model_.num_layers = 32;
    model_.hidden_size = 4096;
    model_.intermediate_size = 14336;
    model_.num_heads = 32;
    model_.num_kv_heads = 8;
    model_.head_dim = 128;
    model_.vocab_size = 92544;
    config_.tp = tp;
    config_.session_len = 1000000;
    config_.max_prefill_token_num = 8448;
    costs_ =
        std::make_unique<CostModel>(model_, config_, sizes_, *find_rates("h100"), 132, cluster);
  }
  const CostModel* operator->() const { return costs_.get(); }

 private:
  const GpuSizes sizes_;
  ModelConfig model_;
  EngineConfig config_;
  std::unique_ptr<CostModel> costs_;
};

TEST(CostModel, AllReducesMoveWhatARingMoves) {
  const double gib = 1 << 30;
  EXPECT_EQ(Costs(1)->all_reduce_seconds(gib), 0);
  // 2 (n - 1) / n of the bytes at the bus bandwidth that was measured, in messages of a chunk.
  EXPECT_NEAR(Costs(2)->all_reduce_seconds(gib), gib / (0.84 * 329e9), 1e-4);
  EXPECT_NEAR(Costs(4)->all_reduce_seconds(gib), 1.5 * gib / (0.84 * 355e9), 1e-4);
  EXPECT_NEAR(Costs(8)->all_reduce_seconds(gib), 1.75 * gib / (0.84 * 355e9), 1e-4);
  // Two hosts: each GPU passes on its eighth over a link of 100 Gbit/s, which is slower than
  // NVLink.
  const Cluster slow = {.gpus_per_host = 8, .link_gbps = 100};
  EXPECT_NEAR(Costs(16, slow)->all_reduce_seconds(gib), gib / 8 / 12.5e9, 1e-4);
  // Of nothing, the time is that of the stages: one pair of them between two hosts, two among four.
  const double inside = Costs(8)->all_reduce_seconds(0);
  const double hop = Costs(16)->all_reduce_seconds(0) - inside;
  EXPECT_GT(inside, 0);
  EXPECT_GT(hop, 0);
  EXPECT_DOUBLE_EQ(Costs(32)->all_reduce_seconds(0) - inside, 2 * hop);
}

TEST(CostModel, SharesArithmeticAndTheRowsOfTheResidual) {
  const CostParts one = Costs(1)->prefill(131072);
  const CostParts eight = Costs(8)->prefill(131072);
  // Their chunks differ, and so what the last tiles of each leave idle.
  EXPECT_NEAR(eight.attention * 8, one.attention, 0.05 * one.attention);
  EXPECT_NEAR(eight.rows * 8, one.rows, 0.01 * one.rows);
  EXPECT_EQ(one.ranks, 0);
  EXPECT_GT(eight.ranks, 0);
  EXPECT_EQ(one.limit(), "attention");
  EXPECT_EQ(Costs(1)->prefill(8192).limit(), "products");
}

TEST(CostModel, ADecodeStepReadsWeightsOnceAndKeysPerSequence) {
  const CostParts one = Costs(1)->decode(131072, 1);
  const CostParts four = Costs(1)->decode(131072, 4);
  EXPECT_EQ(four.products, one.products);
  EXPECT_DOUBLE_EQ(four.attention, 4 * one.attention);
  const CostParts shared = Costs(8)->decode(131072, 1);
  EXPECT_NEAR(shared.products * 8, one.products, 1e-3 * one.products);
  EXPECT_DOUBLE_EQ(shared.attention * 8, one.attention);
  EXPECT_EQ(shared.rows, one.rows);
}

}  // namespace
}  // namespace longspan
