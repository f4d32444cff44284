#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "backend/cuda/kv_layout.h"
#include "backend/cuda/vector.cuh"

/// The codes and parameters of kv_quantize.h, bit for bit, by threads that have eight elements
/// each.
namespace longspan::cuda {

/// What a row, or a group of int4, is quantised by: bfloat16 numbers. A NaN as scale where an
/// element is not finite; a zero of 0 of bytes.
struct KvScale {
  float scale = 0;
  float zero = 0;
};

/// The least scale for codes up to `largest / step`, given largest / step.
__device__ inline float scale_above(float ratio) {
  return bf16_to_float(bf16_above(fmaxf(ratio, kLeastScale)));
}

/// What is known of some elements of a row. Not finite ones show as such in `magnitude`.
struct KvRange {
  uint32_t magnitude = 0;  ///< bits of the largest; those of a NaN are above infinity's
  float least = INFINITY;
  float most = -INFINITY;

  __device__ void add(const Eight& x) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      magnitude = max(magnitude, __float_as_uint(x.x[i]) & 0x7fffffff);
      least = fminf(least, x.x[i]);
      most = fmaxf(most, x.x[i]);
    }
  }
  /// Over groups of kLanes neighbouring lanes.
  template <int kLanes>
  __device__ void merge_magnitudes() {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      magnitude = max(magnitude, __shfl_xor_sync(0xffffffff, magnitude, step));
    }
  }
  template <int kLanes>
  __device__ void merge_all() {
    merge_magnitudes<kLanes>();
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      least = fminf(least, __shfl_xor_sync(0xffffffff, least, step));
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, step));
    }
  }

  __device__ bool is_finite() const { return magnitude < 0x7f800000; }
  __device__ float largest() const { return __uint_as_float(magnitude); }
  __device__ KvScale of(KvElement element) const {
    if (!is_finite()) return {bf16_to_float(kBf16NaN), 0};
    if (element != KvElement::kInt4) {
      return {scale_above(largest() / largest_code(element)), 0};
    }
    if (least > most) return {};  // of nothing
    const float zero = bf16_to_float(bf16_below(least));
    return {scale_above(__fsub_rn(most / 15.0f, zero / 15.0f)), zero};
  }
};

/// to_e4m3() of kv_quantize.h. What CUDA has for cards without the instruction goes through double.
__device__ inline uint32_t to_e4m3_code(float x) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
  constexpr uint32_t kLeastNormal = (127 - 6) << 23;
  const uint32_t bits = __float_as_uint(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal =
      ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3);
  const uint32_t subnormal = __float2uint_rn(__uint_as_float(min(magnitude, kLeastNormal)) * 512);
  return (magnitude >= kLeastNormal ? normal : subnormal) | ((bits >> 24) & 0x80);
#endif
}

/// The codes of eight elements, in order from the low bits on; those of int4 fill x alone, of int6
/// their low bits do, and y has the high ones as KvTile says.
template <KvElement element>
__device__ inline uint2 quantize8(const Eight& v, const KvScale& by) {
  constexpr int kBits = bits_of(element);
  uint32_t words[2] = {};
  if (!(by.scale > 0)) return {};
  const float inverse = 1.0f / by.scale;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float ratio = __fmul_rn(__fsub_rn(v.x[i], by.zero), inverse);
    uint32_t code;
    if constexpr (element == KvElement::kFp8) {
      code = to_e4m3_code(ratio);
    } else if constexpr (element == KvElement::kInt4) {
      code = __float2int_rn(fminf(ratio, 15.0f));
    } else if constexpr (element == KvElement::kInt6) {
      const uint32_t number = __float2int_rn(ratio);
      code = number & 0xf;
      words[1] |= ((number >> 4) & 3) << KvTile::high_shift(i);
    } else {
      code = __float2int_rn(ratio) & 0xff;
    }
    words[i * kBits / 32] |= code << (i * kBits % 32);
  }
  return make_uint2(words[0], words[1]);
}

}  // namespace longspan::cuda
