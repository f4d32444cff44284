#pragma once

#include <utility>

#include "backend/backend.h"
#include "backend/cuda/device_facts.h"
#include "backend/cuda/int8_products.h"
#include "backend/cuda/kv_layout.h"
#include "backend/cuda/linear.h"
#include "backend/cuda/prefill_passes.h"
#include "backend/cuda/step_plan.h"
#include "core/check.h"

namespace longspan::cuda {

// A plan of 67.6 GiB with both took 67.1 GiB on an H100 at its peak: half of this is a margin.

/// Taken when a backend begins: the context, cuBLASLt's workspace and the backend's own buffers.
inline constexpr int64_t kBeginBytes = int64_t{640} << 20;
/// Taken later: code that CUDA loads on first use, and the driver's own needs.
inline constexpr int64_t kLaterBytes = int64_t{512} << 20;
/// Taken by NCCL's connections and staging_ in nccl_communicator.cc, where there are several ranks.
inline constexpr int64_t kGroupBytes = int64_t{1} << 30;

/// What a GPU needs memory for, of which only `facts` must be known. Base: BackendSizes for a plan,
/// Backend for a device that is there.
template <class Base>
class CudaSizes : public Base {
 public:
  explicit CudaSizes(DeviceFacts facts) : facts_(std::move(facts)) {}

  std::string describe() const override {
    return message(facts_.name, " (sm_", facts_.major, facts_.minor, ")");
  }
  DType activation_dtype() const override { return DType::kBF16; }
  DType output_dtype() const override { return DType::kBF16; }
  DType accumulator_dtype() const override { return DType::kF32; }
  DeviceTraits traits() const override {
    // 8448 rows are a whole number of rounds of prefill tiles on an H100's 132 multiprocessors.
    return {.prefill_tokens = 8448,
            .logit_rows = 512,
            .flops_per_second = 1e14,
            .step_seconds = 0.6,  // a short request that comes during a long one waits for two
            .runs_behind = true,
            .deterministic = false,  // cuBLASLt chooses by the number of rows
            .overhead_bytes = kBeginBytes + kLaterBytes,
            .group_bytes = kGroupBytes,
            .head_dim_multiple = 8,  // attention reads heads by 16 bytes
            .max_head_dim = 256};
  }

  /// Products in bytes have kernels for Hopper alone.
  std::span<const LinearDType> linear_dtypes() const override {
    static constexpr LinearDType kDTypes[] = {LinearDType::kNative, LinearDType::kInt8};
    return std::span(kDTypes).first(facts_.is_hopper() ? 2 : 1);
  }
  int64_t packed_linear_bytes(int64_t out_features, int64_t in_features,
                              LinearDType dtype) const override {
    return dtype == LinearDType::kInt8 ? CudaInt8Linear::bytes(out_features, in_features)
                                       : CudaPackedLinear::bytes(out_features, in_features);
  }
  int64_t linear_workspace_bytes(LinearDType dtype) const override {
    return dtype == LinearDType::kInt8 ? Int8Products::kWorkspaceBytes : 0;
  }
  std::span<const KvFormat> kv_formats(int64_t) const override {
    static constexpr KvFormat kFormats[] = {KvFormat::kNative,   KvFormat::kInt8,
                                            KvFormat::kFp8,      KvFormat::kInt8Fp8,
                                            KvFormat::kInt8Int4, KvFormat::kInt4};
    return kFormats;
  }
  std::span<const PrefillAttention> prefill_attentions(int64_t head_dim) const override {
    static constexpr PrefillAttention kAttentions[] = {
        PrefillAttention::kNative, PrefillAttention::kInt8, PrefillAttention::kInt8Fp8};
    return std::span(kAttentions).first(facts_.is_hopper() && head_dim == 128 ? 3 : 1);
  }
  int64_t kv_block_bytes(const KvShape& shape) const override {
    return KvLayout::of(shape).block_bytes;
  }
  int64_t step_plan_bytes(const StepLimits& limits, const AttentionShape& shape) const override {
    return CudaStepPlan::bytes(limits, shape, facts_);
  }
  int64_t least_prefill_tokens(const StepLimits& limits,
                               const AttentionShape& shape) const override {
    return rows_of_a_round(CudaStepPlan::has_workspace(limits), shape.num_heads, shape.num_kv_heads,
                           facts_.num_sms);
  }

 protected:
  const DeviceFacts facts_;
};

}  // namespace longspan::cuda
