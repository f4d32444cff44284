#pragma once

#include "backend/cuda/decode_loader.cuh"

namespace longspan::cuda::decode {

/// Online softmax of a warp over its slices of a span. A lane holds the pairs lane / 4 and
/// lane / 4 + 8; `sum` is of its own keys only.
template <int kPanels>
struct Softmax {
  float out[kPanels * 8][4] = {};  // [n][...] columns 8 n + lane % 4 * 2 + {0, 1}
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  /// Takes the scores of 16 keys, in units of log 2, and leaves their weights as mma's operand A.
  __device__ void weigh(float (&scores)[2][4], uint32_t (&weights)[4]) {
    float rescale[2];
    bool grew = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]),
                      fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
      m = fmaxf(m, __shfl_xor_sync(~0U, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0U, m, 2));
      m = fmaxf(m, max[r]);
      const float base = m == -INFINITY ? 0.0F : m;
      rescale[r] = exp2_approx(max[r] - base);
      grew |= m > max[r];
      max[r] = m;
      float s = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          scores[n][c] = exp2_approx(scores[n][c] - base);
          s += scores[n][c];
        }
      }
      sum[r] = sum[r] * rescale[r] + s;
    }
    if (__any_sync(~0U, grew)) {
#pragma unroll
      for (auto& o : out) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[c] *= rescale[c / 2];
      }
    }
    weights[0] = pack_bf16(scores[0][0], scores[0][1]);
    weights[1] = pack_bf16(scores[0][2], scores[0][3]);
    weights[2] = pack_bf16(scores[1][0], scores[1][1]);
    weights[3] = pack_bf16(scores[1][2], scores[1][3]);
  }
};

/// Operand A of Q K^T for all of head_dim: in registers where there is room, else read again.
template <int kPanels, bool kKept = kPanels <= 2>
class Queries {
 public:
  __device__ Queries(uint32_t q, int lane) {
    address_ = q;
    row_ = lane % 16;
    half_ = lane / 16;
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kPanels * 4; ++k) read(k, kept_[k]);
    }
  }
  __device__ void get(int k, uint32_t (&a)[4]) const {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept_[k][i];
    } else {
      read(k, a);
    }
  }

 private:
  __device__ void read(int k, uint32_t (&a)[4]) const {
    ldmatrix(a, address_ + k / 4 * kSliceBytes + swizzle(row_, k % 4 * 2 + half_));
  }
  uint32_t address_, row_, half_;
  uint32_t kept_[kKept ? kPanels * 4 : 1][4];
};

/// scores[16 pairs][16 keys] = Q K^T, in two sums that do not wait for each other.
template <int kPanels>
__device__ void multiply_keys(const Queries<kPanels>& queries, uint32_t keys, int lane,
                              float (&scores)[2][4]) {
  const uint32_t row = lane % 8 + lane / 16 * 8;
  const uint32_t half = lane / 8 % 2;
  float sums[2][2][4] = {};
#pragma unroll
  for (int k = 0; k < kPanels * 4; ++k) {
    uint32_t a[4];
    uint32_t b[4];
    queries.get(k, a);
    ldmatrix(b, keys + k / 4 * kSliceBytes + swizzle(row, k % 4 * 2 + half));
    mma(sums[k % 2][0], a, b[0], b[1]);
    mma(sums[k % 2][1], a, b[2], b[3]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[n][c] = sums[0][n][c] + sums[1][n][c];
  }
}

/// out[16 pairs][head_dim] += P V.
template <int kPanels>
__device__ void multiply_values(const uint32_t (&weights)[4], uint32_t values, int lane,
                                float (&out)[kPanels * 8][4]) {
  const uint32_t row = lane % 16;
  const uint32_t half = lane / 16;
#pragma unroll
  for (int n = 0; n < kPanels * 4; ++n) {
    uint32_t b[4];
    ldmatrix_trans(b, values + n / 4 * kSliceBytes + swizzle(row, n % 4 * 2 + half));
    mma(out[2 * n], weights, b[0], b[1]);
    mma(out[2 * n + 1], weights, b[2], b[3]);
  }
}

/// Zeroes the rows of a slice of values that hold none: 0 times what stands there need not be 0.
template <int kPanels>
__device__ void zero_rows(uint32_t values, int first, int lane) {
  for (int i = lane; i < kPanels * kSlice * 8; i += 32) {
    const uint32_t address = values + i * 16;
    if (i / 8 % kSlice >= first) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
    }
  }
#if __CUDA_ARCH__ >= 900
  fence_async_proxy();
#endif
  __syncwarp();
}

}  // namespace longspan::cuda::decode
