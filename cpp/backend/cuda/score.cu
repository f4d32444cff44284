#include <cmath>

#include "backend/cuda/score.h"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 512;

/// A running log-sum-exp: sum over x of exp(x - max).
struct LogSumExp {
  float max = -INFINITY;
  double sum = 0.0;

  /// What exponents are taken from: finite where all is -inf so far, and then the sum stays 0.
  __device__ static float base(float max) { return max == -INFINITY ? 0.0f : max; }

  __device__ void raise(float to) {
    if (to <= max) return;
    if (max > -INFINITY) sum *= static_cast<double>(expf(max - to));
    max = to;
  }
  __device__ void merge(LogSumExp other) {
    const float to = fmaxf(max, other.max);
    raise(to);
    other.raise(to);
    sum += other.sum;
  }
};

template <bool kAligned>
__global__ void score_kernel(const float* logits, int64_t stride, int64_t cols, int32_t first_token,
                             const int32_t* targets, PartialScore* scores) {
  __shared__ float maxima[kThreads / 32];
  __shared__ double sums[kThreads / 32];
  const float* row = logits + blockIdx.x * stride;
  LogSumExp total;
  for (int64_t col = int64_t{threadIdx.x} * 8; col < cols; col += kThreads * 8) {
    const int count = static_cast<int>(min(int64_t{8}, cols - col));
    Eight v = load_part<kAligned>(row + col, count);
    float largest = total.max;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) largest = fmaxf(largest, v.x[i]);
    }
    total.raise(largest);
    const float base = LogSumExp::base(largest);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) total.sum += static_cast<double>(expf(v.x[i] - base));  // a NaN stays one
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    total.merge({__shfl_down_sync(0xffffffff, total.max, step),
                 __shfl_down_sync(0xffffffff, total.sum, step)});
  }
  if (threadIdx.x % 32 == 0) {
    maxima[threadIdx.x / 32] = total.max;
    sums[threadIdx.x / 32] = total.sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) total.merge({maxima[warp], sums[warp]});
  const int64_t target = int64_t{targets[blockIdx.x]} - first_token;
  scores[blockIdx.x].max = static_cast<double>(total.max);
  scores[blockIdx.x].sum = total.sum;
  scores[blockIdx.x].target = target >= 0 && target < cols ? static_cast<double>(row[target]) : 0.0;
}

}  // namespace

void score(const MatrixView& logits, int32_t first_token, const int32_t* targets,
           PartialScore* scores, cudaStream_t stream) {
  if (logits.rows == 0) return;
  const auto kernel = has_whole_eights(logits) ? score_kernel<true> : score_kernel<false>;
  kernel<<<static_cast<unsigned>(logits.rows), kThreads, 0, stream>>>(
      static_cast<const float*>(logits.data), logits.stride, logits.cols, first_token, targets,
      scores);
}

}  // namespace longspan::cuda
