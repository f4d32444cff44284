#include <cfloat>
#include <cmath>

#include "backend/cuda/sample.h"
#include "backend/cuda/selection.cuh"
#include "core/philox.h"

namespace longspan::cuda {
namespace {

/// Softmax without its denominator, at most 1; and in units of 2^-44, rounded down. Few
/// instructions in float32, since a block to a row computes longer than it reads. For a token e^-y
/// as likely as the likeliest, the relative error is at most 2^-22 (1 + y).
class Weight {
 public:
  __device__ Weight(float largest, float temperature) : largest_(largest) {
    constexpr double kLog2E = 1.4426950408889634;
    scale_ = static_cast<float>(kLog2E / fmax(temperature, FLT_MIN));
  }

  __device__ float share(float logit) const { return exp2f((logit - largest_) * scale_); }
  __device__ static uint64_t in_units(float share) {
    const uint32_t bits = __float_as_uint(share);
    const uint64_t fraction = (bits & 0x7fffff) | 0x800000;  // 2^-23, had the share no exponent
    return (fraction << (44 - 23)) >> min(127 - (bits >> 23), 63u);
  }
  __device__ uint64_t operator()(float logit) const { return in_units(share(logit)); }

 private:
  float largest_;
  float scale_;
};

/// How much weight of `total` the likeliest tokens are to have together: at least 1.
__device__ uint64_t part_of(float top_p, uint64_t total) {
  const double part = ceil(top_p * static_cast<double>(total));
  return min(total, max(uint64_t{1}, static_cast<uint64_t>(part)));
}

__device__ int32_t draw(const Source& row, float largest, const SamplerRow& settings, Scratch& s) {
  const Weight weight(largest, settings.temperature);
  const auto one_each = [](float logit) { return uint64_t{logit > -INFINITY}; };
  const auto by_count = [&](uint64_t n) { return min(static_cast<uint64_t>(settings.top_k), n); };
  const auto by_weight = [&](uint64_t total) { return part_of(settings.top_p, total); };
  Source source = row;
  Kept kept;
  uint64_t whole = 0;
  if (settings.top_k > 0 && settings.top_k < row.count) {
    source = preselect(row, largest, s, whole, one_each, by_count);
    kept = narrow(source, kept, s, one_each, by_count);
    if (settings.top_p < 1.0f) kept = narrow(source, kept, s, weight, by_weight);
  } else if (settings.top_p < 1.0f) {
    source = preselect(row, largest, s, whole, weight, by_weight);
    kept = narrow(source, kept, s, weight, [&](uint64_t) { return by_weight(whole); });
  }

  const auto weight_if_kept = [&](int i, float logit) {
    // The largest logit weighs 1 and is always kept, so min_p is itself the least weight.
    const float share = weight.share(logit);
    const bool drawable = kept.has(source, i, logit) && share >= settings.min_p;
    return drawable ? Weight::in_units(share) : 0;
  };
  uint64_t total = 0;
  for_each(source, [&](int i, float logit) { total += weight_if_kept(i, logit); });
  total = sum_block(total, s.sums).total;
  const double stop = uniform_at(settings.seed, settings.position) * static_cast<double>(total);
  const int drawn =
      find_in_order(source, min(static_cast<uint64_t>(stop), total - 1), s, weight_if_kept);
  return source.token(drawn);
}

/// The row's edits, shared out to the block's threads; rounded as on the CPU, without fused steps.
__device__ void apply(std::span<LogitEdit> edits, float* logits) {
  for (size_t i = threadIdx.x; i < edits.size(); i += kBlockThreads) {
    LogitEdit& edit = edits[i];
    const float x = edit.original = logits[edit.token];
    const float penalised = x > 0 ? x / edit.penalty : __fmul_rn(x, edit.penalty);
    logits[edit.token] = __fadd_rn(penalised, edit.add);
  }
  __syncthreads();
}
__device__ void undo(std::span<LogitEdit> edits, float* logits) {
  __syncthreads();
  for (size_t i = threadIdx.x; i < edits.size(); i += kBlockThreads) {
    logits[edits[i].token] = edits[i].original;
  }
}

/// A block to a row.
__global__ void __launch_bounds__(kBlockThreads)
    sample_kernel(float* logits, int64_t stride, int cols, const SamplerRow* rows, int32_t* tokens,
                  int32_t* on_host) {
  __shared__ Scratch scratch;
  float* row = logits + blockIdx.x * stride;
  const SamplerRow settings = rows[blockIdx.x];
  apply(settings.edits, row);
  const Source source{row, nullptr, cols};
  const Largest largest = find_largest(source, scratch);
  int32_t token = -1;
  if (largest.finite) {
    token = settings.greedy ? largest.token : draw(source, largest.logit, settings, scratch);
  }
  undo(settings.edits, row);
  if (threadIdx.x == 0) tokens[blockIdx.x] = on_host[blockIdx.x] = token;
}

}  // namespace

void sample(const MatrixView& logits, const SamplerRow* rows, int32_t* tokens, int32_t* on_host,
            cudaStream_t stream) {
  if (logits.rows == 0) return;
  sample_kernel<<<static_cast<unsigned>(logits.rows), kBlockThreads, 0, stream>>>(
      static_cast<float*>(logits.data), logits.stride, static_cast<int>(logits.cols), rows, tokens,
      on_host);
}

}  // namespace longspan::cuda
