#include "backend/cpu/cpu_backend.h"

#include <algorithm>

#include "backend/cpu/attention.h"
#include "backend/cpu/copy_kv_block.h"
#include "backend/cpu/kv_tiles.h"
#include "backend/cpu/linear.h"
#include "backend/cpu/log_probabilities.h"
#include "backend/cpu/move_kv_block.h"
#include "backend/cpu/rotate_append.h"
#include "backend/cpu/rows.h"
#include "backend/cpu/sample.h"
#include "backend/cpu/step_plan.h"
#include "core/check.h"

namespace longspan::cpu {
namespace {

const CpuPackedLinear& packed(const PackedLinear& linear) {
  return static_cast<const CpuPackedLinear&>(linear);
}
const CpuStepPlan& planned(const StepPlan& plan) { return static_cast<const CpuStepPlan&>(plan); }

}  // namespace

CpuBackend::CpuBackend(const InstructionSet& instruction_set, DType dtype, int num_threads)
    : instruction_set_(instruction_set),
      dtype_(dtype),
      kernels_(dtype == DType::kF32 ? instruction_set.f32 : instruction_set.bf16),
      pool_(num_threads),
      score_workspace_(allocate_host(score_workspace_bytes(num_threads))) {}

std::string CpuBackend::describe() const {
  return message("cpu (", instruction_set_.name, ", ", pool_.size(),
                 pool_.size() == 1 ? " thread)" : " threads)");
}

DeviceTraits CpuBackend::traits() const {
  return {.prefill_tokens = 512,
          .logit_rows = 16,
          .flops_per_second = 5e10,
          .step_seconds = 1.0,
          .shares_memory = true,
          .deterministic = true};
}

int64_t CpuBackend::least_prefill_tokens(const StepLimits&, const AttentionShape&) const {
  return 64;  // below this a step is mostly reading weights
}

std::span<const LinearDType> CpuBackend::linear_dtypes() const {
  static constexpr LinearDType kDTypes[] = {LinearDType::kNative};
  return kDTypes;
}
int64_t CpuBackend::packed_linear_bytes(int64_t out_features, int64_t in_features,
                                        LinearDType) const {
  return CpuPackedLinear::bytes(dtype_, out_features, in_features);
}
std::span<const KvFormat> CpuBackend::kv_formats(int64_t) const {
  static constexpr KvFormat kFormats[] = {KvFormat::kNative,  KvFormat::kInt8,     KvFormat::kFp8,
                                          KvFormat::kInt8Fp8, KvFormat::kInt8Int4, KvFormat::kInt4};
  return kFormats;
}
std::span<const PrefillAttention> CpuBackend::prefill_attentions(int64_t) const {
  static constexpr PrefillAttention kAttentions[] = {PrefillAttention::kNative};
  return kAttentions;
}
int64_t CpuBackend::kv_block_bytes(const KvShape& shape) const {
  return KvTiles(shape, dtype_).block_bytes();
}
int64_t CpuBackend::step_plan_bytes(const StepLimits& limits, const AttentionShape& shape) const {
  return CpuStepPlan::bytes(limits, shape, pool_.size());
}

std::unique_ptr<PackedLinear> CpuBackend::pack_linear(std::span<const WeightView> parts,
                                                      std::span<const WeightView> biases,
                                                      LinearDType) {
  return std::make_unique<CpuPackedLinear>(dtype_, parts, biases);
}
Buffer CpuBackend::pack_vector(const WeightView& vector) { return cpu::pack_vector(vector); }

void CpuBackend::copy_kv_block(const KvCache& cache, int32_t from, int32_t to, int64_t tokens) {
  cpu::copy_kv_block(pool_, cache, dtype_, from, to, tokens);
}
void CpuBackend::export_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                                 std::span<std::byte> rows) {
  cpu::export_kv_block(pool_, cache, dtype_, block, tokens, rows);
}
void CpuBackend::import_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                                 std::span<const std::byte> rows) {
  cpu::import_kv_block(pool_, cache, dtype_, block, tokens, rows);
}

std::unique_ptr<StepPlan> CpuBackend::make_step_plan(const StepLimits& limits,
                                                     const AttentionShape& shape) {
  return std::make_unique<CpuStepPlan>(limits, shape, pool_.size());
}
void CpuBackend::plan_step(StepPlan& plan, const StepInput& input, const KvCache& cache) {
  auto& p = static_cast<CpuStepPlan&>(plan);
  const auto is_drawn = [](int32_t id) { return id < 0; };
  if (std::ranges::none_of(input.token_ids, is_drawn)) {
    p.plan(input, cache.shape.context(), pool_);
    return;
  }
  StepInput known = input;
  const std::vector<int32_t>& drawn = draws_[static_cast<size_t>(num_draws_ - 1) % draws_.size()];
  for (int32_t& id : known.token_ids) {
    if (is_drawn(id)) id = drawn[static_cast<size_t>(-1 - id)];
  }
  p.plan(known, cache.shape.context(), pool_);
}
void CpuBackend::embedding(const StepPlan& plan, const PackedLinear& table, int32_t first_token,
                           const MatrixView& out) {
  cpu::embedding(pool_, planned(plan).token_ids(), packed(table), first_token, out);
}
void CpuBackend::rms_norm(const MatrixView* delta, const MatrixView& residual, const Buffer& weight,
                          float eps, const MatrixView& out) {
  cpu::rms_norm(kernels_, pool_, delta, residual, weight.as<const float>(), eps, out);
}
void CpuBackend::linear(const MatrixView& x, const PackedLinear& weight, const MatrixView& y) {
  cpu::linear(kernels_, pool_, x, packed(weight), y);
}
void CpuBackend::rotate_append(const StepPlan& plan, int64_t layer, const MatrixView& qkv,
                               const QkNorm* norm, const KvCache& cache, const MatrixView& q_out) {
  cpu::rotate_append(kernels_, pool_, planned(plan), layer, qkv, norm, cache, q_out);
}
void CpuBackend::attention(const StepPlan& plan, int64_t layer, const MatrixView& q,
                           const KvCache& cache, const MatrixView& out,
                           const MatrixView* log_sum_exp) {
  cpu::attention(kernels_, pool_, planned(plan), layer, q, cache, out, log_sum_exp);
}
void CpuBackend::weigh_partial_attention(const MatrixView& log_sum_exps, int64_t own,
                                         int64_t num_heads, const MatrixView& attention) {
  cpu::weigh_partial_attention(pool_, log_sum_exps, own, num_heads, attention);
}
void CpuBackend::silu_mul(const MatrixView& gate_up, const MatrixView& out) {
  cpu::silu_mul(kernels_, pool_, gate_up, out);
}
void CpuBackend::gather_rows(const MatrixView& in, std::span<const int64_t> rows,
                             const MatrixView& out) {
  cpu::gather_rows(pool_, in, rows, out);
}
void CpuBackend::score(const MatrixView& hidden, const PackedLinear& head, int32_t first_token,
                       std::span<const int32_t> targets, const MatrixView&,
                       std::span<PartialScore> scores) {
  cpu::score(kernels_, pool_, hidden, packed(head), first_token, targets,
             score_workspace_.as<float>(), scores);
}
int64_t CpuBackend::start_sample(const MatrixView& logits, std::span<const SamplerRow> rows) {
  std::vector<int32_t>& tokens = draws_[static_cast<size_t>(num_draws_) % draws_.size()];
  tokens.resize(rows.size());
  cpu::sample(pool_, logits, rows, tokens);
  return num_draws_++;
}
void CpuBackend::sampled(int64_t draw, std::span<int32_t> tokens) {
  std::ranges::copy(draws_[static_cast<size_t>(draw) % draws_.size()], tokens.begin());
}
void CpuBackend::log_probabilities(const MatrixView& logits, std::span<const int32_t> tokens,
                                   int64_t top, std::span<TokenLogprob> out) {
  cpu::log_probabilities(kernels_, pool_, logits, tokens, top, out);
}
void CpuBackend::download(const MatrixView& in, float* out) { cpu::download(pool_, in, out); }
void CpuBackend::upload(const float* in, const MatrixView& out) { cpu::upload(pool_, in, out); }

}  // namespace longspan::cpu
