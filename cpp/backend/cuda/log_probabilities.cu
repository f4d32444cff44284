#include <cmath>

#include "backend/cuda/log_probabilities.h"
#include "backend/cuda/selection.cuh"

namespace longspan::cuda {
namespace {

static_assert(kMaxLogprobs <= kBlockThreads);

/// Sorts one number of each thread in descending order, thread 0 to have the largest: a bitonic
/// sort (Batcher 1968).
__device__ uint64_t sort_block(uint64_t x, uint64_t (&shared)[kBlockThreads]) {
  const int own = static_cast<int>(threadIdx.x);
  for (int run = 2; run <= kBlockThreads; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      shared[own] = x;
      __syncthreads();
      const uint64_t other = shared[own ^ step];
      const bool larger = ((own & step) == 0) == ((own & run) == 0);
      x = larger ? max(x, other) : min(x, other);
    }
  }
  return x;
}

/// Sum of exp(logit - largest) over the row, in an order that depends on V alone.
__device__ double sum_exp(const Source& row, float largest, double (&shared)[kBlockWarps]) {
  double sum = 0.0;
  for_each(row, [&](int, float logit) { sum += static_cast<double>(expf(logit - largest)); });
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (lane_index() == 0) shared[warp_index()] = sum;
  __syncthreads();
  sum = 0.0;
  for (const double part : shared) sum += part;
  return sum;
}

/// The row's `top` likeliest tokens, one to a thread from thread 0 on.
__device__ TokenLogprob find_top(const Source& row, float largest, int32_t top, Scratch& s,
                                 uint64_t (&shared)[kBlockThreads]) {
  const auto one_each = [](float) { return uint64_t{1}; };
  const auto all = [&](uint64_t) { return static_cast<uint64_t>(top); };
  uint64_t whole = 0;
  const Source source = preselect(row, largest, s, whole, one_each, all);
  Kept kept;
  kept = narrow(source, kept, s, one_each, all);
  // As numbers that order as wanted: by the logit, among equals the lower token first.
  __syncthreads();  // narrow() has been read by all
  if (threadIdx.x == 0) s.found[0] = 0;
  shared[threadIdx.x] = 0;
  __syncthreads();
  for_each(source, [&](int i, float logit) {
    if (!kept.has(source, i, logit)) return;
    const auto place = atomicAdd(reinterpret_cast<unsigned long long*>(&s.found[0]), 1ull);
    shared[place] = uint64_t{key_of(logit)} << 32 | static_cast<uint32_t>(~source.token(i));
  });
  __syncthreads();
  const uint64_t key = sort_block(shared[threadIdx.x], shared);
  return {static_cast<int32_t>(~static_cast<uint32_t>(key)),
          logit_of(static_cast<uint32_t>(key >> 32))};
}

/// A block to a row.
__global__ void __launch_bounds__(kBlockThreads)
    log_probabilities_kernel(const float* logits, int64_t stride, int cols, const int32_t* tokens,
                             int32_t top, TokenLogprob* out) {
  extern __shared__ Scratch scratch[];
  __shared__ uint64_t shared[kBlockThreads];
  __shared__ double sums[kBlockWarps];
  const Source row{logits + blockIdx.x * stride, nullptr, cols};
  TokenLogprob* result = out + int64_t{blockIdx.x} * (1 + top);
  const int32_t token = tokens[blockIdx.x];
  const Largest largest = find_largest(row, *scratch);
  const int index = static_cast<int>(threadIdx.x);
  if (!largest.finite) {
    if (index == 0) result[0] = {token, NAN};
    if (index < top) result[1 + index] = {-1, NAN};
    return;
  }
  const double log_sum = log(sum_exp(row, largest.logit, sums)) + largest.logit;
  const auto logprob = [&](float logit) { return static_cast<float>(logit - log_sum); };
  if (index == 0) result[0] = {token, logprob(row.logits[token])};
  if (top == 0) return;
  const TokenLogprob one = find_top(row, largest.logit, top, *scratch, shared);
  if (index < top) result[1 + index] = {one.token, logprob(one.logprob)};
}

}  // namespace

void log_probabilities(const MatrixView& logits, const int32_t* tokens, int32_t top,
                       TokenLogprob* out, cudaStream_t stream) {
  if (logits.rows == 0) return;
  cudaFuncSetAttribute(log_probabilities_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       sizeof(Scratch));
  log_probabilities_kernel<<<static_cast<unsigned>(logits.rows), kBlockThreads, sizeof(Scratch),
                             stream>>>(static_cast<const float*>(logits.data), logits.stride,
                                       static_cast<int>(logits.cols), tokens, top, out);
}

}  // namespace longspan::cuda
