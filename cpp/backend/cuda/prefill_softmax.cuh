#pragma once

#include "backend/cuda/mma.cuh"

/// The running softmax of scores that lie in wgmma accumulators: s[4 j + 2 h + i] of a thread is
/// row lane / 4 + 8 h of its warp's 16, key 8 j + lane % 4 * 2 + i of a tile of 2 kScores keys.
namespace longspan::cuda {

/// How far the maximum may be exceeded before it moves, and all sums with it. A weight is then at
/// most 2^8, which costs no precision.
constexpr float kSlackLog2 = 8.0f;

/// Of a thread's two rows, 8 apart.
struct RunningSoftmax {
  float max[2] = {-INFINITY, -INFINITY};  ///< about that of the raw scores; a row's lanes agree
  float sum[2] = {0.0f, 0.0f};            ///< of the weights of this lane's keys
};

/// Sets the scores of keys that a row does not see to minus infinity: all but the first `sees` of
/// the tile's, of each of a thread's rows.
template <int kScores>
__device__ inline void mask_scores(float (&s)[kScores], const int (&sees)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int most = sees[h] - 1 - column;
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + i > most) s[4 * j + 2 * h + i] = -INFINITY;
      }
    }
  }
}

/// Replaces scores by their weights, 2^(scale_log2 (s - max)), of the maximum so far, each row by
/// its scale. `factor` is what sums of earlier weights are to be multiplied by: exactly 1 where the
/// maximum has stayed.
template <bool kMasked, int kScores>
__device__ inline void softmax_step(float (&s)[kScores], RunningSoftmax& state,
                                    const float (&scale_log2)[2], float (&factor)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most[4] = {s[2 * h], s[2 * h + 1], s[4 + 2 * h], s[5 + 2 * h]};
#pragma unroll
    for (int j = 2; j < kScores / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        most[j % 2 * 2 + i] = fmaxf(most[j % 2 * 2 + i], s[4 * j + 2 * h + i]);
      }
    }
    const float old = state.max[h];
    float max = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffU, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffU, max, 2));
    max =
        (max - old) * scale_log2[h] > kSlackLog2 ? max : old;  // old while both are minus infinity
    factor[h] = max == old ? 1.0f : exp2_approx((old - max) * scale_log2[h]);
    state.max[h] = max;
    // A row may have seen no key yet.
    const float base = kMasked && max == -INFINITY ? 0.0f : max * scale_log2[h];
    float sum[4] = {};
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& w = s[4 * j + 2 * h + i];
        w = exp2_approx(fmaf(w, scale_log2[h], -base));
        sum[j % 2 * 2 + i] += w;
      }
    }
    state.sum[h] = fmaf(state.sum[h], factor[h], (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

/// Rounds weights to bfloat16, which makes them left operands of wgmma_rs.
template <int kScores>
__device__ inline void pack_weights(const float (&s)[kScores], uint32_t (&p)[kScores / 8][4]) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

/// Multiplies what a warp has summed up so far by the factors of softmax_step.
template <int kCount>
__device__ inline void rescale(float (&o)[kCount], const float (&factor)[2]) {
  // Maxima hardly ever move.
  if (__all_sync(0xffffffffU, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[i / 2 % 2];
}

/// The sums of whole rows.
__device__ inline void add_up_lanes(const RunningSoftmax& state, float (&sums)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sums[h] = state.sum[h];
    sums[h] += __shfl_xor_sync(0xffffffffU, sums[h], 1);
    sums[h] += __shfl_xor_sync(0xffffffffU, sums[h], 2);
  }
}

}  // namespace longspan::cuda
