#include "backend/cuda/int8_keys.h"
#include "backend/cuda/int8_rows.cuh"
#include "backend/cuda/mma.cuh"
#include "backend/cuda/staged_seqs.cuh"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

constexpr int kHeadDim = 128;
constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, in a key

__device__ inline Eight load_key(const CachedRows& keys, int key, int chunk) {
  return load8(reinterpret_cast<const __nv_bfloat16*>(keys.at(key, chunk)));
}

__device__ inline float* mean_of(const QuantizeKeysArgs& args, int seq, int kv_head) {
  return args.to.means + (int64_t{seq} * args.from.num_kv_heads + kv_head) * kHeadDim;
}

constexpr int kMeanThreads = 1024;
constexpr int kMeanKeys = kMeanThreads / kChunks;  // at once
constexpr int kSampledKeys = 1024;                 // of which the mean is taken, evenly spread

/// Blocks: [kv_head][sequence].
__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const __grid_constant__ QuantizeKeysArgs args) {
  __shared__ float sums[kMeanKeys][kHeadDim];
  const int seq = args.seqs[blockIdx.y];
  const auto kv_head = static_cast<int>(blockIdx.x);
  const CachedRows keys(args, args.from.key, seq, kv_head);
  const auto thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % kChunks;
  const int count = min(keys.count(), kSampledKeys);
  Eight sum{};
#pragma unroll 4
  for (int i = thread / kChunks; i < count; i += kMeanKeys) {
    const Eight x = load_key(keys, static_cast<int>(int64_t{i} * keys.count() / count), chunk);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.x[j] += x.x[j];
  }
  store8(sum, &sums[thread / kChunks][chunk * 8]);
  for (int half = kMeanKeys / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = thread; i < half * kHeadDim; i += kMeanThreads) {
      sums[i / kHeadDim][i % kHeadDim] += sums[half + i / kHeadDim][i % kHeadDim];
    }
  }
  __syncthreads();
  if (thread < kHeadDim) {
    mean_of(args, seq, kv_head)[thread] = sums[0][thread] / static_cast<float>(count);
  }
}

constexpr int kLanes = 4;                      // of a token
constexpr int kLaneChunks = kChunks / kLanes;  // of which a lane makes half as many
constexpr int kThreads = kPanelTokens * kLanes;

/// Blocks: [panel][kv_head].
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ QuantizeKeysArgs args) {
  __shared__ int longest_of_warp[kThreads / 32];
  const auto panel = static_cast<int>(blockIdx.x);
  const auto kv_head = static_cast<int>(blockIdx.y);
  const int seq = seq_of_panel(args.to.seqs, args.seqs, args.num_seqs, panel);
  const CachedRows keys(args, args.from.key, seq, kv_head);
  const auto thread = static_cast<int>(threadIdx.x);
  const int token = thread / kLanes;
  const int lane = thread % kLanes;
  const int key = (panel - static_cast<int>(args.to.seqs[seq].table)) * kPanelTokens + token;

  Eight x[kLaneChunks] = {};
  float largest = 0.0f;
  if (key < keys.count()) {
    const float* mean = mean_of(args, seq, kv_head);
#pragma unroll
    for (int c = 0; c < kLaneChunks; ++c) x[c] = load_key(keys, key, lane * kLaneChunks + c);
#pragma unroll
    for (int c = 0; c < kLaneChunks; ++c) {
      const Eight off = load8(mean + (lane * kLaneChunks + c) * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[c].x[i] -= off.x[i];
        largest = fmaxf(largest, fabsf(x[c].x[i]));
      }
    }
  }
  const Int8Scale by = int8_scale(largest_of_block<kThreads>(largest));

  const int64_t at = int64_t{kv_head} * args.to.num_panels + panel;
  char* to = args.to.panels + at * kPanelBytes;
  int squares = 0;
#pragma unroll
  for (int c = 0; c < kLaneChunks; c += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* four = &x[c + i / 2].x[i % 2 * 4];
      words[i] = to_int8(four[0], four[1], four[2], four[3], by.inverse);
      squares = add_squares(words[i], squares);
    }
    *reinterpret_cast<uint4*>(to + swizzle(token, (lane * kLaneChunks + c) / 2)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
  squares += __shfl_xor_sync(0xffffffffU, squares, 1);
  squares += __shfl_xor_sync(0xffffffffU, squares, 2);
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
    squares = max(squares, __shfl_xor_sync(0xffffffffU, squares, step));
  }
  if (thread % 32 == 0) longest_of_warp[thread / 32] = squares;
  __syncthreads();
  if (thread == 0) {
    for (const int other : longest_of_warp) squares = max(squares, other);
    args.to.scales[at] = {by.scale, sqrtf(static_cast<float>(squares)) * by.scale};
  }
}

}  // namespace

cudaError_t quantize_keys(const QuantizeKeysArgs& args, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(args.from.num_kv_heads);
  mean_kernel<<<dim3(heads, static_cast<unsigned>(args.num_seqs)), kMeanThreads, 0, stream>>>(args);
  quantize_kernel<<<dim3(static_cast<unsigned>(args.to.num_panels), heads), kThreads, 0, stream>>>(
      args);
  return cudaGetLastError();
}

}  // namespace longspan::cuda
