#pragma once

#include "backend/cuda/int8_rows.cuh"
#include "backend/cuda/prefill_sm90.cuh"
#include "backend/cuda/prefill_softmax.cuh"

/// Queries in eight bits, their scores as sums of products in integers, and the running softmax of
/// these, for steps of two panels of 64 keys, each with a scale of its own.
namespace longspan::cuda {

/// Of a step's keys: the scales of both panels, and what no key, so multiplied, is longer than.
struct alignas(16) Int8StepKeys {
  float scale[2];
  float length;
};

/// Scores of a panel before their scales, where wgmma leaves them: see prefill_softmax.cuh. They
/// begin at the bits of the float 1.5 * 2^23, so that as bits of a float they are 1.5 * 2^23 +
/// q k^T: no sum reaches 2^22. That float is greater where its bits are, as integers, minus
/// infinity included.
using Int8Sums = int32_t[kPanelTokens / 2];
constexpr float kSumsBegin = 0x1.8p23f;
static_assert(127 * 127 * 128 < 1 << 22);

__device__ inline void begin_sums(Int8Sums& sums) {
#pragma unroll
  for (int32_t& sum : sums) sum = __float_as_int(kSumsBegin);
}

/// Sums of keys that a row does not see become minus infinity: see mask_scores.
__device__ inline void mask_sums(Int8Sums& sums, int limit, int last) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int most = min(limit + 8 * h, last) - column;
#pragma unroll
    for (int j = 0; j < kPanelTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + i > most) sums[4 * j + 2 * h + i] = __float_as_int(-INFINITY);
      }
    }
  }
}

/// The largest sum of the thread's row h, as a float.
__device__ inline float largest_of(const Int8Sums& sums, int h) {
  int32_t most[2] = {max(sums[2 * h], sums[2 * h + 1]), max(sums[4 + 2 * h], sums[5 + 2 * h])};
#pragma unroll
  for (int j = 2; j < kPanelTokens / 8; ++j) {
    most[j % 2] = __vimax3_s32(most[j % 2], sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
  }
  return __int_as_float(max(most[0], most[1]));
}

/// A warpgroup's 64 queries in eight bits as the left operand of a product, in registers.
class Int8Queries {
 public:
  /// Of bfloat16 queries in shared memory: see QueryBuffers.
  __device__ explicit Int8Queries(const char* at) {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Of each 16 elements, this lane's four.
      float four[kSixteens][4];
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        const int chunk = 2 * i + lane % 4 / 2;
        const auto bits = *reinterpret_cast<const uint2*>(
            at + chunk / 8 * kPanelBytes + swizzle(row + 8 * h, chunk % 8) + lane % 2 * 8);
        four[i][0] = __uint_as_float(bits.x << 16);
        four[i][1] = __uint_as_float(bits.x & 0xffff0000U);
        four[i][2] = __uint_as_float(bits.y << 16);
        four[i][3] = __uint_as_float(bits.y & 0xffff0000U);
#pragma unroll
        for (const float x : four[i]) largest = fmaxf(largest, fabsf(x));
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 2));
      const Int8Scale by = int8_scale(largest);
      scale_[h] = by.scale;
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        q_[i / 2][i % 2 * 2 + h] =
            to_int8(four[i][0], four[i][1], four[i][2], four[i][3], by.inverse);
      }
      int squares = 0;
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) squares = add_squares(q_[i / 2][i % 2 * 2 + h], squares);
      squares += __shfl_xor_sync(0xffffffffU, squares, 1);
      squares += __shfl_xor_sync(0xffffffffU, squares, 2);
      length_[h] = sqrtf(static_cast<float>(squares)) * by.scale;
    }
  }

  /// Of the lane's row h.
  __device__ float scale(int h) const { return scale_[h]; }
  /// What row h, so multiplied, is not longer than.
  __device__ float length(int h) const { return length_[h]; }

  /// sums += q k^T of a panel of keys.
  __device__ void multiply(Int8Sums& sums, uint64_t k) const {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) wgmma_int8(sums, q_[i], wgmma_advance(k, 32 * i));
  }

  /// Puts the warp's 16 into shared memory, [64][128] bytes in the 128-byte swizzle.
  __device__ void store(char* to) const {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kSixteens; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint32_t*>(to + swizzle(row + 8 * h, i) + lane % 4 * 4) =
            q_[i / 2][i % 2 * 2 + h];
      }
    }
  }

 private:
  static constexpr int kDim = 128;
  static constexpr int kSixteens = kDim / 16;
  uint32_t q_[kSixteens / 2][4];
  float scale_[2];
  float length_[2];
};

/// The running softmax of a thread's two rows, 8 apart, without their running maxima. A weight is
/// 2^(score - base), and any base will do that keeps weights and their sums in range: bfloat16 has
/// the range of float. It is about the largest score to begin with, and moves only where a step
/// might hold a score far above it, which the lengths of query and keys rule out for nearly every
/// step (no product is larger than that of the lengths), or where a sum has grown large. Whether a
/// row's base moves depends on nothing but that row.
class Int8Softmax {
 public:
  /// Begins a step. Whether a base of the warp's rows might have to move: then move_bases() before
  /// weigh().
  __device__ bool begin_step(const Int8StepKeys& keys, const Int8Queries& q, float scale_log2) {
    const float length = keys.length * scale_log2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        scale_[panel][h] = keys.scale[panel] * scale_log2 * q.scale(h);
      }
      // So also while the base is minus infinity.
      moves_[h] =
          !(fmaf(length, q.length(h), -base_[h]) < kReachLog2) || largest_sum(h) > kLargeSum;
    }
    return __any_sync(0xffffffffU, moves_[0] || moves_[1]);
  }

  /// Of the sums of the step's panels. What was summed up of earlier weights is to be multiplied by
  /// `factor`: exactly 1 where the base stays.
  __device__ void move_bases(const Int8Sums (&sums)[2], float (&factor)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float max = fmaxf(largest_score(sums[0], 0, h), largest_score(sums[1], 1, h));
      if (largest_sum(h) > kLargeSum) max = fmaxf(max, base_[h] + log2f(largest_sum(h)));
      float moves = moves_[h] ? 1.0f : 0.0f;
#pragma unroll
      for (int lane = 1; lane < 4; lane *= 2) {
        max = fmaxf(max, __shfl_xor_sync(0xffffffffU, max, lane));
        moves = fmaxf(moves, __shfl_xor_sync(0xffffffffU, moves, lane));
      }
      // Stays while both are minus infinity.
      const bool stays = moves == 0.0f || !(max - base_[h] > kSlackLog2);
      factor[h] = stays ? 1.0f : exp2_approx(base_[h] - max);
      if (!stays) base_[h] = max;
      sum_[h][0] *= factor[h];
      sum_[h][1] *= factor[h];
    }
  }

  /// The weights of a panel of the step, rounded to bfloat16, which makes them left operands of
  /// wgmma_rs, in p[4 panel] and on. The sums begin anew.
  template <bool kMasked>
  __device__ void weigh(Int8Sums& sums, int panel, uint32_t (&p)[kKeys / 16][4]) {
    float offset[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // A row may have seen no key yet.
      const float base = kMasked && base_[h] == -INFINITY ? 0.0f : base_[h];
      offset[h] = fmaf(-kSumsBegin, scale_[panel][h], -base);
    }
#pragma unroll
    for (int j = 0; j < kPanelTokens / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float w[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          w[i] = exp2_approx(
              fmaf(__int_as_float(sums[4 * j + 2 * h + i]), scale_[panel][h], offset[h]));
          sum_[h][i] += w[i];
        }
        p[panel * (kPanelTokens / 16) + j / 2][j % 2 * 2 + h] = pack_bf16(w[0], w[1]);
      }
    }
    begin_sums(sums);
  }

  /// One over the sums of whole rows.
  __device__ void invert_sums(float (&inverse)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = sum_[h][0] + sum_[h][1];
      sum += __shfl_xor_sync(0xffffffffU, sum, 1);
      sum += __shfl_xor_sync(0xffffffffU, sum, 2);
      inverse[h] = 1.0f / sum;
    }
  }

 private:
  /// Scores may be so far above the base: sums of weights and of their products with values are
  /// floats, with a factor of 2^31 left.
  static constexpr float kReachLog2 = 96.0f;
  /// A base moves up when a lane's sum of its row's weights has passed this.
  static constexpr float kLargeSum = 0x1p24f;

  __device__ float largest_sum(int h) const { return fmaxf(sum_[h][0], sum_[h][1]); }

  __device__ float largest_score(const Int8Sums& sums, int panel, int h) const {
    return (largest_of(sums, h) - kSumsBegin) * scale_[panel][h];
  }

  float base_[2] = {-INFINITY, -INFINITY};  // of scaled scores; a row's lanes agree
  float sum_[2][2] = {};                    // of the weights of this lane's even and odd keys
  float scale_[2][2];                       // of the step's sums, by panel and row
  bool moves_[2];                           // whether this lane asks to move the row's base
};

}  // namespace longspan::cuda
