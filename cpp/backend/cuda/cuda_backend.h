#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "backend/cuda/attention.h"
#include "backend/cuda/cublaslt.h"
#include "backend/cuda/cuda_sizes.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/int8_products.h"
#include "backend/cuda/step_plan.h"
#include "backend/cuda/weight_stager.h"

namespace longspan::cuda {

/// One GPU as a backend: weights, cache and what enters a product in bfloat16. Ops are queued on
/// one stream and return at once; only those that give values to the host wait for it.
class CudaBackend final : public CudaSizes<Backend> {
 public:
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  std::string describe() const override;
  int64_t free_bytes() const override;

  std::unique_ptr<Communicator> make_communicator(std::unique_ptr<Communicator> host) override;

  Buffer allocate(int64_t bytes) override;

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
  bool run_whole(StepPlan& plan, const std::function<void()>& ops) override;
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
  void linear_silu_mul(const MatrixView& x, const PackedLinear& weight, const MatrixView& gate_up,
                       const MatrixView& out) override;
  void end_layer(const StepPlan& plan) override;
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
  static constexpr int kLayersBehind = 2;
  static constexpr int kDrawsKept = 2;
  static constexpr int64_t kSmallBytes = 1 << 20;  // of small_ and results_

  void use_device() const;  // the CUDA runtime keeps a device per thread
  /// Waits until all that is queued is done, and throws what went wrong in it.
  void wait();
  /// The same for what was queued before an event.
  void wait_for(cudaEvent_t event, const char* what);
  /// Waits until query() no longer says cudaErrorNotReady, or the group is no more.
  template <class Query>
  void query(Query query, const char* what);
  /// Waits, then copies the first out.size() values of results_ to the host.
  template <class T>
  void fetch(std::span<T> out);
  /// Attention of the sequences of a pass.
  void prefill(const CudaStepPlan& plan, const PlannedPass& planned, AttentionArgs args);
  LogitEdit* upload_edits(std::span<const LogitEdit> edits);
  /// Page-locked memory for a block on its way between the cache and the host.
  char* block_on_host(int64_t bytes);

  cudaStream_t stream_ = nullptr;
  cudaEvent_t layer_done_[kLayersBehind] = {};
  int64_t layers_queued_ = 0;
  Communicator* group_ = nullptr;  // made here, alive while ops are called; null: one rank
  WeightStager stager_;
  std::unique_ptr<CublasLt> cublas_;
  Int8Products int8_;
  UploadRing small_;  // rows, targets, samplers
  std::unique_ptr<UploadRing> edits_;
  Buffer drawn_;          // device int32 [kMaxDrawn], of the last draw
  Buffer drawn_on_host_;  // page-locked int32 [kDrawsKept][kMaxDrawn], which the device writes
  cudaEvent_t draw_done_[kDrawsKept] = {};
  int64_t num_draws_ = 0;
  Buffer results_;          // device memory of what goes to the host: likelihoods
  Buffer results_on_host_;  // page-locked
  Buffer block_on_host_;    // page-locked
};

}  // namespace longspan::cuda
