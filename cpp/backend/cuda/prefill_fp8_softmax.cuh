#pragma once

#include "backend/cuda/prefill_int8_softmax.cuh"

/// The running softmax of scores as sums of products in integers, its weights in e4m3, for steps of
/// two panels of 64 keys.
namespace longspan::cuda {

/// A step's weights as left operands of wgmma_fp8, of 32 keys each.
using Fp8Weights = uint32_t[kKeys / 32][4];

/// The running softmax of a thread's two rows, 8 apart. A weight is 2^(score - base). e4m3 holds 18
/// powers of two, so the base follows the largest score of the steps, up and down, a lazy way: it
/// moves where a step's largest weight would leave [2^kLeastLog2, 2^kMostLog2], to where that
/// weight is 2^kAimLog2. Down it goes to 2^-kDepthLog2 of the highest there was, where no number of
/// keys adds up to anything, so that what was summed up before stays a float. Whether a row's base
/// moves depends on nothing but that row. Sums of weights are not kept here: they are a product of
/// the rounded weights with ones.
class Fp8Softmax {
 public:
  /// Begins a step. Whether a base of the warp's rows might have to move: then move_bases() before
  /// weigh().
  __device__ bool begin_step(const Int8Sums (&sums)[2], const float (&key_scale)[2],
                             const Int8Queries& q, float scale_log2) {
    bool moves = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most[2];  // relative to the base
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        scale_[panel][h] = key_scale[panel] * scale_log2 * q.scale(h);
        most[panel] = fmaf(largest_of(sums[panel], h), scale_[panel][h], offset(panel, h));
      }
      moves |= leaves(fmaxf(most[0], most[1]), h);
    }
    return __any_sync(0xffffffffU, moves);
  }

  /// What was summed up of earlier weights is to be multiplied by `factor`: exactly 1 where the
  /// base stays.
  __device__ void move_bases(const Int8Sums (&sums)[2], float (&factor)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = -INFINITY;
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        most = fmaxf(most, (largest_of(sums[panel], h) - kSumsBegin) * scale_[panel][h]);
      }
#pragma unroll
      for (int lane = 1; lane < 4; lane *= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, lane));
      }
      // A row that sees no key yet has none to begin from.
      const bool moves = leaves(most - base_[h], h) & (most > -INFINITY);
      const float base = moves ? fmaxf(most - kAimLog2, lowest_[h]) : base_[h];
      // It begins at infinity: sums are zero then.
      factor[h] = moves ? exp2_approx(fminf(base_[h] - base, kDepthLog2)) : 1.0f;
      base_[h] = base;
      lowest_[h] = moves ? fmaxf(lowest_[h], base - kDepthLog2) : lowest_[h];
    }
  }

  /// Turns the sums of the step's keys 32 i and on into weights, floats.
  __device__ void weigh(Int8Sums (&sums)[2], int i) const {
    const int panel = i / 2;
    const float offsets[2] = {offset(panel, 0), offset(panel, 1)};
#pragma unroll
    for (int k = 0; k < kSumsOf32; ++k) {
      int32_t& sum = sums[panel][i % 2 * kSumsOf32 + k];
      const int h = k / 2 % 2;
      sum = __float_as_int(exp2_approx(fmaf(__int_as_float(sum), scale_[panel][h], offsets[h])));
    }
  }

  /// Rounds the weights of these keys to e4m3.
  __device__ static void pack(const Int8Sums (&sums)[2], int i, Fp8Weights& p) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          w[e] =
              __int_as_float(sums[i / 2][i % 2 * kSumsOf32 + 8 * c + 4 * (e / 2) + 2 * h + e % 2]);
        }
        p[i][2 * c + h] = pack_e4m3(w[0], w[1], w[2], w[3]);
      }
    }
  }

 private:
  static constexpr int kSumsOf32 = 16;      // of a thread
  static constexpr float kMostLog2 = 8.5f;  // 448 is the largest number
  static constexpr float kAimLog2 = 5.0f;
  static constexpr float kLeastLog2 = -4.0f;
  static constexpr float kDepthLog2 = 32.0f;

  /// Whether a largest score, relative to the base, is where the base moves.
  __device__ bool leaves(float most, int h) const {
    return (most > kMostLog2) | ((most < kLeastLog2) & (base_[h] > lowest_[h]));
  }

  /// sum * scale + offset is a score relative to the base.
  __device__ float offset(int panel, int h) const {
    return fmaf(-kSumsBegin, scale_[panel][h], -base_[h]);
  }

  float base_[2] = {INFINITY, INFINITY};      // of scaled scores; a row's lanes agree
  float lowest_[2] = {-INFINITY, -INFINITY};  // that the base may become
  float scale_[2][2];                         // of the step's sums, by panel and row
};

}  // namespace longspan::cuda
