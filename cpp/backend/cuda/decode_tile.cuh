#pragma once

#include <type_traits>

#include "backend/cuda/decode_loader.cuh"
#include "backend/cuda/kv_quantize.cuh"

namespace longspan::cuda::decode {

/// Online softmax of a warp over its slices of a span. A lane holds the pairs lane % 4 * 2 + {0, 1}
/// of keys, or columns, lane / 4 and others that are multiples of 8 further; `sum` is of its own
/// keys only.
template <class C>
struct Softmax {
  /// With m = kHalfWord of a value, [n][2 h + r] is pair lane % 4 * 2 + r, column
  /// 16 m (n / m) + 8 m h + m (lane / 4) + n % m: what multiply_values() makes of a value's words.
  float out[C::kRowDim / 16][4] = {};
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  /// Takes the scores of a slice, in units of log 2, and leaves their weights.
  __device__ void weigh(float (&scores)[C::kKeys / 16][4]) {
    float rescale[2];
    bool grew = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = fmaxf(scores[0][r], scores[0][2 + r]);
#pragma unroll
      for (int t = 1; t < C::kKeys / 16; ++t) m = fmaxf(m, fmaxf(scores[t][r], scores[t][2 + r]));
#pragma unroll
      for (int i = 4; i < 32; i *= 2) m = fmaxf(m, __shfl_xor_sync(~0U, m, i));
      m = fmaxf(m, max[r]);
      const float base = m == -INFINITY ? 0.0F : m;
      rescale[r] = exp2_approx(max[r] - base);
      grew |= m > max[r];
      max[r] = m;
      float s = 0;
#pragma unroll
      for (auto& score : scores) {
#pragma unroll
        for (int c = r; c < 4; c += 2) {
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
        for (int c = 0; c < 4; ++c) o[c] *= rescale[c % 2];
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

/// Operand B of K Q^T for all of row_dim, in registers: what put_query() put, by 32 bytes.
template <class C>
class Queries {
  static constexpr int kSteps = C::kRowDim / 16;

 public:
  __device__ Queries(uint32_t q, int lane) {
#pragma unroll
    for (int k = 0; k < kSteps; k += 2) {
      ldmatrix(words_[k / 2], q + k / 4 * kQueryPanel + swizzle(lane % 8, k % 4 * 2 + lane / 8));
    }
  }
  /// sum += a, of 16 keys, times step k.
  template <class Sum>
  __device__ void multiply(Sum (&sum)[4], const uint32_t (&a)[4], int k) const {
    mma(sum, a, words_[k / 2][k % 2 * 2], words_[k / 2][k % 2 * 2 + 1]);
  }

 private:
  uint32_t words_[kSteps / 2][4];
};

__device__ inline uint32_t read_shared(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ inline uint16_t read_shared_half(uint32_t address) {
  uint16_t half;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(address) : "memory");
  return half;
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
/// Stand for those of other elements.
struct NoHighBits {
  __device__ NoHighBits(uint32_t, int, int) {}
};
struct NoScales {
  __device__ NoScales(uint32_t, int) {}
};
template <class S>
using HighBitsOf = std::conditional_t<S::kElement == KvElement::kInt6, HighBits<S>, NoHighBits>;
template <class S>
using ScalesOf = std::conditional_t<S::kElement == KvElement::kInt4, GroupScales<S>, NoScales>;

/// scores = K Q^T, in the order of a product's result, but for the keys' scales, and of keys in
/// integers the queries': [t][c] is of key 16 t + lane / 4 + 8 (c / 2), pair lane % 4 * 2 + c % 2.
template <class C>
__device__ void multiply_keys(const Queries<C>& queries, uint32_t keys, int lane,
                              float (&scores)[C::kKeys / 16][4]) {
  using S = typename C::Key;
  // Of keys in integers a product with the high bytes and one with the low, exact; of others two
  // that do not wait for each other.
  using Sum = std::conditional_t<S::kIntegers, int32_t, float>;
  Sum sums[2][C::kKeys / 16][4] = {};
  const uint32_t row = lane % 16;
  const uint32_t half = lane / 16;
  constexpr int kChunks = S::kTokenBytes / 16;
#pragma unroll
  for (int t = 0; t < C::kKeys / 16; ++t) {
    if constexpr (S::kNative || S::kElement == KvElement::kInt8) {
#pragma unroll
      for (int k = 0; k < kChunks / 2; ++k) {
        uint32_t a[4];
        ldmatrix(a, keys + S::at(t * 16 + row, k * 2 + half));
        if constexpr (S::kNative) {
          queries.multiply(sums[k % 2][t], a, k);
        } else {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            queries.multiply(sums[part][t], a, part * (kChunks / 2) + k);
          }
        }
      }
    } else {
      constexpr bool kInt6 = S::kElement == KvElement::kInt6;
      static_assert(kInt6 || S::kElement == KvElement::kFp8);
      const HighBitsOf<S> high[2] = {{keys, t * 16 + lane / 4, lane},
                                     {keys, t * 16 + 8 + lane / 4, lane}};
#pragma unroll
      for (int c = 0; c < kChunks; c += 2) {
        uint32_t words[4];  // [chunk][keys 0 to 7, or 8 to 15]
        ldmatrix(words, keys + S::at(t * 16 + row, c + half));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // A chunk's words, widened to two, are those of a step.
          uint32_t wide[2][2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if constexpr (kInt6) {
              bytes_of_int6(words[2 * i + j], high[j].of(c + i), wide[j]);
            } else {
              widen<S::kElement>(words[2 * i + j], wide[j]);
            }
          }
          const uint32_t a[4] = {wide[0][0], wide[1][0], wide[0][1], wide[1][1]};
          if constexpr (kInt6) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
              queries.multiply(sums[part][t], a, part * kChunks + c + i);
            }
          } else {
            queries.multiply(sums[i][t], a, c + i);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if constexpr (S::kIntegers) {
        scores[t][c] = static_cast<float>(sums[0][t][c] * 256 + sums[1][t][c]);
      } else {
        scores[t][c] = sums[0][t][c] + sums[1][t][c];
      }
    }
  }
}

/// Multiplies scores, or weights, of keys by a factor of the lane's pairs and by the scales that a
/// slice of bytes has, in multiply_keys()'s order.
template <class S>
__device__ void multiply_scales(uint32_t slice, int lane, const float (&factor)[2],
                                float (&x)[S::kKeys / 16][4]) {
#pragma unroll
  for (int t = 0; t < S::kKeys / 16; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float by = 1;
      if constexpr (S::kScaleBytes == 2) {
        by = bf16_to_float(read_shared_half(slice + S::kScales + (t * 16 + h * 8 + lane / 4) * 2));
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) x[t][2 * h + r] *= factor[r] * by;
    }
  }
}

/// out[row_dim][8 pairs] += V^T P, in Softmax's order; weights in multiply_keys()'s.
template <class C>
__device__ void multiply_values(const float (&weights)[C::kKeys / 16][4], uint32_t values, int lane,
                                float (&out)[C::kRowDim / 16][4]) {
  using S = typename C::Value;
  constexpr int kPairs = kHalfWord<S::kElement>;
  const uint32_t row = lane % 16;
  const uint32_t half = lane / 16;
#pragma unroll
  for (int t = 0; t < C::kKeys / 16; ++t) {
    const uint32_t b0 = transposed(pack_bf16(weights[t][0], weights[t][1]));
    const uint32_t b1 = transposed(pack_bf16(weights[t][2], weights[t][3]));
    const int key = t * 16 + lane % 4 * 2;
    const ScalesOf<S> scales[4] = {
        {values, key}, {values, key + 1}, {values, key + 8}, {values, key + 9}};
#pragma unroll
    for (int c = 0; c < S::kTokenBytes / 16; c += 2) {
      uint32_t words[4];  // [chunk][keys 0 to 7, or 8 to 15]
      ldmatrix_trans(words, values + S::at(t * 16 + row, c + half));
      uint32_t pairs[4][kPairs];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        widen<S::kElement>(words[w], pairs[w]);
        if constexpr (S::kElement == KvElement::kInt4) {
          const uint32_t even = scales[w % 2 * 2].of(c + w / 2);
          const uint32_t odd = scales[w % 2 * 2 + 1].of(c + w / 2);
          const __nv_bfloat162 scale = as_bf16x2(__byte_perm(even, odd, 0x5410));
          const __nv_bfloat162 zero = as_bf16x2(__byte_perm(even, odd, 0x7632));
#pragma unroll
          for (uint32_t& pair : pairs[w]) pair = scaled(pair, scale, zero);
        }
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const uint32_t a[4] = {pairs[0][i], pairs[2][i], pairs[1][i], pairs[3][i]};
        mma(out[c / 2 * kPairs + i], a, b0, b1);
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
