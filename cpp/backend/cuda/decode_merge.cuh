#pragma once

#include "backend/cuda/decode_finish.cuh"
#include "backend/cuda/overlap.cuh"

namespace longspan::cuda::decode {

constexpr int kMergeWarps = 8;
constexpr int kMaxHeadDim = 256;
static_assert(kMaxDecodeSplits <= 64, "a lane weighs two partial results");

/// One pair at a time: out = sum of 2^(lse_i - max) partial_i over the sum of the weights. Warp w
/// adds partial results w, w + kMergeWarps, ..., and the warps' sums are added in order.
static __global__ void __launch_bounds__(32 * kMergeWarps)
    merge_kernel(const __grid_constant__ AttentionArgs args,
                 const __grid_constant__ DecodeWork work) {
  __shared__ __align__(16) float sums[kMergeWarps][kMaxHeadDim];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int head_dim = args.kv.head_dim;
  const int num_kv_heads = args.kv.num_kv_heads;
  const int64_t units = int64_t{work.counts->num_merges} * num_kv_heads;
  // The plan was there before the step began: a block's first unit is known before it waits.
  DecodeMerge merge;
  SeqView seq;
  const auto read = [&](int64_t unit) {
    if (unit >= units * kDecodePairs) return;
    merge = work.merges[unit % units / num_kv_heads];
    seq = args.plan.seqs[merge.seq];
  };
  read(blockIdx.x);
  let_next_kernel_start();
  wait_for_previous_kernel();
  for (int64_t u = blockIdx.x; u < units * kDecodePairs; u += gridDim.x) {
    if (u != blockIdx.x) read(u);
    const int pair = static_cast<int>(u / units);
    const int kv_head = static_cast<int>(u % num_kv_heads);
    if (pair >= merge.num_pairs) continue;
    const int64_t first = merge.partial + int64_t{kv_head} * merge.num_pairs + pair;
    const int64_t step = int64_t{num_kv_heads} * merge.num_pairs;

    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int split = lane + 32 * i;
      weight[i] = split < merge.num_spans ? work.partial_lse[first + split * step] : -INFINITY;
    }
    float max = fmaxf(weight[0], weight[1]);
    for (int i = 16; i > 0; i /= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, i));
    weight[0] = exp2_approx(weight[0] - max);
    weight[1] = exp2_approx(weight[1] - max);
    float total = weight[0] + weight[1];
    for (int i = 16; i > 0; i /= 2) total += __shfl_xor_sync(~0U, total, i);

    float4 sum[kMaxHeadDim / 128] = {};
#pragma unroll
    for (int i = 0; i < kMaxDecodeSplits / kMergeWarps; ++i) {
      const int split = warp + i * kMergeWarps;
      const float w = __shfl_sync(~0U, weight[i * kMergeWarps / 32], split % 32);
      if (split >= merge.num_spans) continue;
      const float* from = work.partial_out + (first + split * step) * head_dim;
#pragma unroll
      for (int j = 0; j < kMaxHeadDim / 128; ++j) {
        const int col = j * 128 + lane * 4;
        if (col >= head_dim) continue;
        const float4 x = *reinterpret_cast<const float4*>(from + col);
        sum[j].x += w * x.x;
        sum[j].y += w * x.y;
        sum[j].z += w * x.z;
        sum[j].w += w * x.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 128; ++j) {
      *reinterpret_cast<float4*>(&sums[warp][j * 128 + lane * 4]) = sum[j];
    }
    __syncthreads();
    const PairPlace place(args, seq, kv_head, merge.first_pair + pair);
    if (threadIdx.x == 0) place.note(args, max + log2f(total));
    for (int col = threadIdx.x * 2; col < head_dim; col += 2 * 32 * kMergeWarps) {
      float2 x = {};
      for (int w = 0; w < kMergeWarps; ++w) {
        x.x += sums[w][col];
        x.y += sums[w][col + 1];
      }
      *reinterpret_cast<uint32_t*>(args.out + place.row * args.out_stride + place.col + col) =
          pack_bf16(x.x / total, x.y / total);
    }
    __syncthreads();
  }
}

}  // namespace longspan::cuda::decode
