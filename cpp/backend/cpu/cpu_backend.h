#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// The CPU as a backend: each op is a file of this folder, run by one pool of threads.
class CpuBackend final : public Backend {
 public:
  /// dtype: kBF16 or kF32, of weights, cache and what enters a product. num_threads >= 1.
  CpuBackend(const InstructionSet& instruction_set, DType dtype, int num_threads);

  std::string describe() const override;
  DType activation_dtype() const override { return dtype_; }
  DType output_dtype() const override { return DType::kF32; }
  DType accumulator_dtype() const override { return DType::kF32; }
  DeviceTraits traits() const override;
  int64_t free_bytes() const override { return available_host_bytes(); }

  std::unique_ptr<Communicator> make_communicator(std::unique_ptr<Communicator> host) override {
    return host;  // its matrices are host memory
  }

  Buffer allocate(int64_t bytes) override { return allocate_host(bytes); }
  std::span<const LinearDType> linear_dtypes() const override;
  int64_t packed_linear_bytes(int64_t out_features, int64_t in_features,
                              LinearDType dtype) const override;
  int64_t linear_workspace_bytes(LinearDType) const override { return 0; }
  std::span<const KvFormat> kv_formats(int64_t head_dim) const override;
  std::span<const PrefillAttention> prefill_attentions(int64_t head_dim) const override;
  int64_t kv_block_bytes(const KvShape& shape) const override;
  int64_t step_plan_bytes(const StepLimits& limits, const AttentionShape& shape) const override;
  int64_t least_prefill_tokens(const StepLimits& limits,
                               const AttentionShape& shape) const override;

  std::unique_ptr<PackedLinear> pack_linear(std::span<const WeightView> parts,
                                            std::span<const WeightView> biases,
                                            LinearDType dtype) override;
  Buffer pack_vector(const WeightView& vector) override;

  void copy_kv_block(const KvCache& cache, int32_t from, int32_t to, int64_t tokens) override;
  void export_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                       std::span<std::byte> rows) override;
  void import_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                       std::span<const std::byte> rows) override;

  std::unique_ptr<StepPlan> make_step_plan(const StepLimits& limits,
                                           const AttentionShape& shape) override;
  void plan_step(StepPlan& plan, const StepInput& input, const KvCache& cache) override;
  void embedding(const StepPlan& plan, const PackedLinear& table, int32_t first_token,
                 const MatrixView& out) override;
  void rms_norm(const MatrixView* delta, const MatrixView& residual, const Buffer& weight,
                float eps, const MatrixView& out) override;
  void linear(const MatrixView& x, const PackedLinear& weight, const MatrixView& y) override;
  void rotate_append(const StepPlan& plan, int64_t layer, const MatrixView& qkv, const QkNorm* norm,
                     const KvCache& cache, const MatrixView& q_out) override;
  void attention(const StepPlan& plan, int64_t layer, const MatrixView& q, const KvCache& cache,
                 const MatrixView& out, const MatrixView* log_sum_exp) override;
  void weigh_partial_attention(const MatrixView& log_sum_exps, int64_t own, int64_t num_heads,
                               const MatrixView& attention) override;
  void silu_mul(const MatrixView& gate_up, const MatrixView& out) override;
  void end_layer(const StepPlan&) override {}  // ops are done when they return
  void gather_rows(const MatrixView& in, std::span<const int64_t> rows,
                   const MatrixView& out) override;
  void score(const MatrixView& hidden, const PackedLinear& head, int32_t first_token,
             std::span<const int32_t> targets, const MatrixView& workspace,
             std::span<PartialScore> scores) override;
  int64_t start_sample(const MatrixView& logits, std::span<const SamplerRow> rows) override;
  void sampled(int64_t draw, std::span<int32_t> tokens) override;
  void log_probabilities(const MatrixView& logits, std::span<const int32_t> tokens, int64_t top,
                         std::span<TokenLogprob> out) override;
  void download(const MatrixView& in, float* out) override;
  void upload(const float* in, const MatrixView& out) override;

 private:
  const InstructionSet& instruction_set_;
  const DType dtype_;
  const Kernels& kernels_;
  ThreadPool pool_;
  Buffer score_workspace_;
  std::array<std::vector<int32_t>, 2> draws_;  // the last two, each at its number's remainder
  int64_t num_draws_ = 0;
};

}  // namespace longspan::cpu
