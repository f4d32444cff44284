#pragma once

#include "backend/cuda/decode_tile.cuh"

namespace longspan::cuda::decode {

/// Where pair p of a span is read and written: its row of the step and its query head.
struct PairPlace {
  int64_t row;
  int64_t head;
  int64_t col;

  __device__ PairPlace(const AttentionArgs& args, const SeqView& seq, int kv_head, int pair) {
    const int group = args.num_heads / args.kv.num_kv_heads;
    row = seq.first_row + pair / group;
    head = kv_head * group + pair % group;
    col = head * args.kv.head_dim;
  }
  /// Notes a log-sum-exp in base 2, where it is asked for.
  __device__ void note(const AttentionArgs& args, float log2_sum_exp) const {
    if (args.log_sum_exp == nullptr) return;
    args.log_sum_exp[row * args.log_sum_exp_stride + head] = log2_sum_exp * kLn2;
  }
};

/// Puts the warps' results together and writes them: to out, or normalised to the partial rows.
template <class C>
__device__ void finish_span(const AttentionArgs& args, const DecodeWork& work,
                            const DecodeSpan& span, const SeqView& seq, int kv_head,
                            Softmax<C>& softmax, Fixed<C>& shared) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int own_pair = lane % 4 * 2;  // and the next
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
#pragma unroll
    for (int i = 4; i < 32; i *= 2) sum += __shfl_xor_sync(~0U, sum, i);
    if (lane < 4) {
      shared.max[warp][own_pair + r] = softmax.max[r];
      shared.sum[warp][own_pair + r] = sum;
    }
  }
  __syncthreads();

  const auto max_of = [&](int pair) {
    float m = shared.max[0][pair];
    for (int w = 1; w < C::kWarps; ++w) m = fmaxf(m, shared.max[w][pair]);
    return m;
  };
  float scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float m = max_of(own_pair + r);
    scale[r] = m == -INFINITY ? 0.0F : exp2_approx(softmax.max[r] - m);
  }
  // Now each thread writes some columns of one pair at a time.
  constexpr int kOfPair = C::kThreads / kDecodePairs;
  constexpr int kCols = kExchangeCols / kOfPair;
  const int pair = threadIdx.x / kOfPair;
  const int first_col = threadIdx.x % kOfPair * kCols;
  const float max = max_of(pair);
  float sum = 0;
  for (int w = 0; w < C::kWarps; ++w) {
    if (max != -INFINITY) sum += shared.sum[w][pair] * exp2_approx(shared.max[w][pair] - max);
  }
  const float inverse = sum > 0 ? 1.0F / sum : 0.0F;
  const PairPlace place(args, seq, kv_head, span.first_pair + pair);
  const int64_t partial = span.partial + int64_t{kv_head} * span.num_pairs + pair;

  constexpr int kRun = kHalfWord<C::Value::kElement>;  // columns of a lane that follow each other
#pragma unroll
  for (int p = 0; p < C::kRowDim / kExchangeCols; ++p) {
#pragma unroll
    for (int n = 0; n < kExchangeCols / 16; n += kRun) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float* to =
            &shared.exchange[warp][own_pair + c % 2][n * 16 + (c / 2 * 8 + lane / 4) * kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          to[i] = softmax.out[p * (kExchangeCols / 16) + n + i][c] * scale[c % 2];
        }
      }
    }
    __syncthreads();
    const int col = p * kExchangeCols + first_col;
    if (pair < span.num_pairs && col < args.kv.head_dim) {
      float o[kCols] = {};
      for (int w = 0; w < C::kWarps; ++w) {
#pragma unroll
        for (int c = 0; c < kCols; ++c) o[c] += shared.exchange[w][pair][first_col + c];
      }
#pragma unroll
      for (float& x : o) x *= inverse;
      if (span.partial < 0) {
        auto* to =
            reinterpret_cast<uint32_t*>(args.out + place.row * args.out_stride + place.col + col);
#pragma unroll
        for (int c = 0; c < kCols; c += 2) to[c / 2] = pack_bf16(o[c], o[c + 1]);
        if (col == 0) place.note(args, max + log2f(sum));
      } else {
        auto* to = reinterpret_cast<float2*>(work.partial_out + partial * args.kv.head_dim + col);
#pragma unroll
        for (int c = 0; c < kCols; c += 2) to[c / 2] = make_float2(o[c], o[c + 1]);
        if (col == 0) work.partial_lse[partial] = max + log2f(sum);
      }
    }
    __syncthreads();
  }
}

}  // namespace longspan::cuda::decode
