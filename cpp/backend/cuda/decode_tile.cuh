#pragma once

#include <type_traits>

#include "backend/cuda/decode_loader.cuh"
#include "backend/cuda/kv_quantize.cuh"

namespace longspan::cuda::decode {

/// Online softmax of a warp over its slices of a span. A lane holds the pairs lane / 4 and
/// lane / 4 + 8; `sum` is of its own keys only.
template <class C>
struct Softmax {
  /// With m = kHalfWord of a value, [n][2 r + i] is pair lane / 4 + 8 r, column
  /// 8 m (n / m) + 2 m (lane % 4) + m i + n % m: what multiply_values() makes of a value's words.
  float out[C::kRowDim / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  /// Takes the scores of a slice, in units of log 2, and leaves their weights.
  __device__ void weigh(float (&scores)[C::kKeys / 8][4]) {
    float rescale[2];
    bool grew = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < C::kKeys / 8; ++n) {
        m = fmaxf(m, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      }
      m = fmaxf(m, __shfl_xor_sync(~0U, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0U, m, 2));
      m = fmaxf(m, max[r]);
      const float base = m == -INFINITY ? 0.0F : m;
      rescale[r] = exp2_approx(max[r] - base);
      grew |= m > max[r];
      max[r] = m;
      float s = 0;
#pragma unroll
      for (auto& score : scores) {
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          score[c] = exp2_approx(score[c] - base);
          s += score[c];
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
  }
};

/// The largest number that a high and a low signed byte make, 256 high + low.
constexpr float kLargestQuery = 127 * 256 + 127;

/// Puts chunk `chunk` of a pair's query, 8 elements, where Queries reads what keys are multiplied
/// by: for keys in integers the elements as numbers of two bytes times a scale, [high or low]
/// [row_dim], in int6 of every 32 the even ones first; for others the elements in the order in
/// which widen() gives those of a key. For whole warps to call, the chunks of a pair by
/// neighbouring lanes.
template <class C>
__device__ void put_query(Fixed<C>& shared, int pair, int chunk, uint4 q) {
  using S = typename C::Key;
  const auto at = [&](int c) { return shared.q + c / 8 * kQueryPanel + swizzle(pair, c % 8); };
  if constexpr (S::kNative) {
    *reinterpret_cast<uint4*>(at(chunk)) = q;
  } else if constexpr (S::kIntegers) {
    constexpr bool kInt6 = S::kElement == KvElement::kInt6;
    const Eight x = eight_of(q);
    KvRange range;
    range.add(x);
    range.merge_magnitudes<C::kRowDim / 8>();
    // Of a row that is not finite the scale says so, as that of a key does.
    const float scale = range.is_finite() ? fmaxf(range.largest() / kLargestQuery, kLeastScale)
                                          : bf16_to_float(kBf16NaN);
    const float inverse = range.is_finite() ? 1.0F / scale : 0.0F;
    uint32_t words[2][2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int number = __float2int_rn(x.x[i] * inverse);
      const int high = (number + 128) >> 8;
      const int word = kInt6 ? i % 2 : i / 4;
      const int shift = (kInt6 ? i / 2 : i % 4) * 8;
      words[0][word] |= (high & 0xff) << shift;
      words[1][word] |= ((number - high * 256) & 0xff) << shift;
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int first = part * (C::kRowDim / 16);
      if constexpr (kInt6) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          reinterpret_cast<uint32_t*>(at(first + chunk / 4 * 2 + w))[chunk % 4] = words[part][w];
        }
      } else {
        reinterpret_cast<uint2*>(at(first + chunk / 2))[chunk % 2] =
            make_uint2(words[part][0], words[part][1]);
      }
    }
    // Codes of int6 come times 4.
    if (chunk == 0) shared.q_scale[pair] = kInt6 ? scale / 4 : scale;
  } else {
    reinterpret_cast<uint2*>(at(chunk / 2 * 2))[chunk % 2] =
        make_uint2(__byte_perm(q.x, q.y, 0x5410), __byte_perm(q.z, q.w, 0x5410));
    reinterpret_cast<uint2*>(at(chunk / 2 * 2 + 1))[chunk % 2] =
        make_uint2(__byte_perm(q.x, q.y, 0x7632), __byte_perm(q.z, q.w, 0x7632));
  }
}

/// Operand A of Q K^T for all of row_dim, what put_query() put by 32 bytes: in registers where
/// there is room, else read again.
template <class C, bool kKept = C::kRowDim <= 128>
class Queries {
 public:
  static constexpr int kSteps = C::kRowDim / 16;

  __device__ Queries(uint32_t q, int lane) {
    address_ = q;
    row_ = lane % 16;
    half_ = lane / 16;
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) read(k, kept_[k]);
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
    ldmatrix(a, address_ + k / 4 * kQueryPanel + swizzle(row_, k % 4 * 2 + half_));
  }
  uint32_t address_, row_, half_;
  uint32_t kept_[kKept ? kSteps : 1][4];
};

__device__ inline uint32_t read_shared(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

template <int n>
__device__ void read_shared(uint32_t address, uint32_t (&words)[n]) {
  if constexpr (n == 1) {
    words[0] = read_shared(address);
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(words[i]), "=r"(words[i + 1])
                   : "r"(address + i * 4)
                   : "memory");
    }
  }
}

/// Of a row of int6, the high bits that go with the words a lane gets of its chunks.
template <class S>
struct HighBits {
  uint32_t words[S::kHighBytes / 16];

  __device__ HighBits(uint32_t slice, int row, int lane) {
    read_shared(slice + S::kHigh + row * S::kHighBytes + lane % 4 * (S::kHighBytes / 4), words);
  }
  /// With the word of 16-byte chunk `chunk`, in the low half.
  __device__ uint32_t of(int chunk) const { return words[chunk / 2] >> (chunk % 2 * 16); }
};

/// The scales and zeros of a row of int4, by group.
template <class S>
struct GroupScales {
  uint32_t words[S::kScaleBytes / 4];

  __device__ GroupScales(uint32_t slice, int row) {
    read_shared(slice + S::kScales + row * S::kScaleBytes, words);
  }
  /// Of the group of 16-byte chunk `chunk`.
  __device__ uint32_t of(int chunk) const {
    return words[chunk * 32 / static_cast<int>(kInt4Group)];
  }
};
/// Stands for those of other elements.
struct NoScales {
  __device__ NoScales(uint32_t, int) {}
};
template <class S>
using ScalesOf = std::conditional_t<S::kElement == KvElement::kInt4, GroupScales<S>, NoScales>;

/// scores[16 pairs][kKeys] = Q K^T but for the keys' scales, and of keys in integers the queries',
/// in two sums that do not wait for each other.
template <class C>
__device__ void multiply_keys(const Queries<C>& queries, uint32_t keys, int lane,
                              float (&scores)[C::kKeys / 8][4]) {
  using S = typename C::Key;
  // Of keys in integers a product with the high bytes and one with the low, exact.
  using Sum = std::conditional_t<S::kIntegers, int32_t, float>;
  Sum sums[2][C::kKeys / 8][4] = {};
  if constexpr (S::kElement == KvElement::kInt8) {
    constexpr int kSteps = C::kRowDim / 32;
    const uint32_t row = lane % 16;
    const uint32_t half = lane / 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[2][4];
      queries.get(k, a[0]);
      queries.get(kSteps + k, a[1]);
#pragma unroll
      for (int t = 0; t < C::kKeys / 16; ++t) {
        uint32_t b[4];
        ldmatrix(b, keys + S::at(t * 16 + row, k * 2 + half));
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mma(sums[part][2 * t], a[part], b[0], b[2]);
          mma(sums[part][2 * t + 1], a[part], b[1], b[3]);
        }
      }
    }
  } else if constexpr (S::kElement == KvElement::kInt6) {
    constexpr int kSteps = C::kRowDim / 32;  // a chunk of 16 bytes each
    const uint32_t row = lane % 16;
    const uint32_t half = lane / 16;
#pragma unroll
    for (int t = 0; t < C::kKeys / 16; ++t) {
      const HighBits<S> high[2] = {{keys, t * 16 + lane / 4, lane},
                                   {keys, t * 16 + 8 + lane / 4, lane}};
#pragma unroll
      for (int c = 0; c < kSteps; c += 2) {
        uint32_t words[4];  // [chunk][keys 0 to 7, or 8 to 15]
        ldmatrix(words, keys + S::at(t * 16 + row, c + half));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b[2];
          bytes_of_int6(words[i], high[i % 2].of(c + i / 2), b);
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            uint32_t a[4];
            queries.get(part * kSteps + c + i / 2, a);
            mma(sums[part][2 * t + i % 2], a, b[0], b[1]);
          }
        }
      }
    }
  } else if constexpr (S::kNative) {
    const uint32_t row = lane % 8 + lane / 16 * 8;
    const uint32_t half = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < queries.kSteps; ++k) {
      uint32_t a[4];
      queries.get(k, a);
#pragma unroll
      for (int t = 0; t < C::kKeys / 16; ++t) {
        uint32_t b[4];
        ldmatrix(b, keys + S::at(t * 16 + row, k * 2 + half));
        mma(sums[k % 2][2 * t], a, b[0], b[1]);
        mma(sums[k % 2][2 * t + 1], a, b[2], b[3]);
      }
    }
  } else {
    // A chunk of 16 bytes per key holds what two registers of operand B want for kSteps steps.
    constexpr int kPairs = kHalfWord<S::kElement>;
    constexpr int kSteps = kPairs / 2;
    const uint32_t row = lane % 16;
    const uint32_t half = lane / 16;
#pragma unroll
    for (int t = 0; t < C::kKeys / 16; ++t) {
#pragma unroll
      for (int c = 0; c < S::kTokenBytes / 16; c += 2) {
        uint32_t words[4];  // [chunk][keys 0 to 7, or 8 to 15]
        ldmatrix(words, keys + S::at(t * 16 + row, c + half));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t pairs[kPairs];
          widen<S::kElement>(words[i], pairs);
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            uint32_t a[4];
            queries.get((c + i / 2) * kSteps + s, a);
            mma(sums[(i / 2 + s) % 2][2 * t + i % 2], a, pairs[2 * s], pairs[2 * s + 1]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if constexpr (S::kIntegers) {
        scores[n][c] = static_cast<float>(sums[0][n][c] * 256 + sums[1][n][c]);
      } else {
        scores[n][c] = sums[0][n][c] + sums[1][n][c];
      }
    }
  }
}

/// Multiplies scores, or weights, of keys by a factor of the lane's pair and by the scales that a
/// slice of bytes has: [n][c] is of pair lane / 4 + 8 (c / 2), key 8 n + lane % 4 * 2 + c % 2.
template <class S>
__device__ void multiply_scales(uint32_t slice, int lane, const float (&factor)[2],
                                float (&x)[S::kKeys / 8][4]) {
#pragma unroll
  for (int n = 0; n < S::kKeys / 8; ++n) {
    float by[2] = {1, 1};
    if constexpr (S::kScaleBytes == 2) {
      const uint32_t word = read_shared(slice + S::kScales + (n * 8 + lane % 4 * 2) * 2);
      by[0] = __uint_as_float(word << 16);
      by[1] = __uint_as_float(word & 0xffff0000);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) x[n][c] *= factor[c / 2] * by[c % 2];
  }
}

/// out[16 pairs][row_dim] += P V, in Softmax's order of columns.
template <class C>
__device__ void multiply_values(const float (&weights)[C::kKeys / 8][4], uint32_t values, int lane,
                                float (&out)[C::kRowDim / 8][4]) {
  using S = typename C::Value;
  constexpr int kPairs = kHalfWord<S::kElement>;
  const uint32_t row = lane % 16;
  const uint32_t half = lane / 16;
#pragma unroll
  for (int t = 0; t < C::kKeys / 16; ++t) {
    const auto& low_keys = weights[2 * t];
    const auto& high_keys = weights[2 * t + 1];
    const uint32_t a[4] = {pack_bf16(low_keys[0], low_keys[1]), pack_bf16(low_keys[2], low_keys[3]),
                           pack_bf16(high_keys[0], high_keys[1]),
                           pack_bf16(high_keys[2], high_keys[3])};
    const int key = t * 16 + lane % 4 * 2;
    const ScalesOf<S> scales[4] = {
        {values, key}, {values, key + 1}, {values, key + 8}, {values, key + 9}};
#pragma unroll
    for (int c = 0; c < S::kTokenBytes / 16; c += 2) {
      uint32_t words[4];  // [chunk][keys 0 to 7, or 8 to 15]
      ldmatrix_trans(words, values + S::at(t * 16 + row, c + half));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t pairs[2][kPairs];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          widen<S::kElement>(words[2 * h + i], pairs[i]);
          if constexpr (S::kElement == KvElement::kInt4) {
            const uint32_t even = scales[2 * i].of(c + h);
            const uint32_t odd = scales[2 * i + 1].of(c + h);
            const __nv_bfloat162 scale = as_bf16x2(__byte_perm(even, odd, 0x5410));
            const __nv_bfloat162 zero = as_bf16x2(__byte_perm(even, odd, 0x7632));
#pragma unroll
            for (uint32_t& pair : pairs[i]) pair = scaled(pair, scale, zero);
          }
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          mma(out[(c + h) * kPairs + i], a, pairs[0][i], pairs[1][i]);
        }
      }
    }
  }
}

/// Zeroes what stands for the values of rows from `first` on, which hold none: 0 times it need not
/// be 0. Of quantised rows the scales will do, for every code is a number.
template <class S>
__device__ void zero_rows(uint32_t values, int first, int lane) {
  if constexpr (S::kNative) {
    for (int i = lane; i < S::kScales / 16; i += 32) {
      const uint32_t address = values + i * 16;
      if (i * 16 % S::kPanelBytes / S::kRowBytes >= first) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
      }
    }
  } else {
    for (int i = first * S::kScaleBytes / 2 + lane; i < S::kKeys * S::kScaleBytes / 2; i += 32) {
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(values + S::kScales + i * 2), "h"(uint16_t{0})
                   : "memory");
    }
  }
#if __CUDA_ARCH__ >= 900
  fence_async_proxy();
#endif
  __syncwarp();
}

}  // namespace longspan::cuda::decode
