#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/matrix.h"

namespace longspan::cuda {

/// Eight consecutive elements as float32, the unit of the row-wise kernels: 16 bytes of bfloat16.
struct Eight {
  float x[8];
};

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ void store(float x, float* p) { *p = x; }
inline __device__ void store(float x, __nv_bfloat16* p) { *p = __float2bfloat16_rn(x); }

/// p is aligned to 16 bytes.
inline __device__ Eight load8(const float* p) {
  const float4 a = reinterpret_cast<const float4*>(p)[0];
  const float4 b = reinterpret_cast<const float4*>(p)[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}
/// Of eight bfloat16.
inline __device__ Eight eight_of(uint4 bits) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  Eight v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.x[2 * i] = __uint_as_float(words[i] << 16);
    v.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
  }
  return v;
}
inline __device__ Eight load8(const __nv_bfloat16* p) {
  return eight_of(*reinterpret_cast<const uint4*>(p));
}

/// The bits of eight bfloat16, rounded to nearest even.
inline __device__ uint4 to_bf16(const Eight& v) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v.x[2 * i], v.x[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return {words[0], words[1], words[2], words[3]};
}

inline __device__ void store8(const Eight& v, float* p) {
  reinterpret_cast<float4*>(p)[0] = {v.x[0], v.x[1], v.x[2], v.x[3]};
  reinterpret_cast<float4*>(p)[1] = {v.x[4], v.x[5], v.x[6], v.x[7]};
}
inline __device__ void store8(const Eight& v, __nv_bfloat16* p) {
  *reinterpret_cast<uint4*>(p) = to_bf16(v);
}

/// The first `count` of eight elements at p, one at a time unless kAligned says that all eight are
/// there, at a multiple of 16 bytes; zeros for the rest.
template <bool kAligned, class T>
__device__ Eight load_part(const T* p, int count) {
  if constexpr (kAligned) {
    return load8(p);
  } else {
    Eight v;
#pragma unroll
    for (int i = 0; i < 8; ++i) v.x[i] = i < count ? to_float(p[i]) : 0.0f;
    return v;
  }
}
template <bool kAligned, class T>
__device__ void store_part(const Eight& v, T* p, int count) {
  if constexpr (kAligned) {
    store8(v, p);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) store(v.x[i], p + i);
    }
  }
}

/// Sum over groups of kLanes neighbouring lanes, the same in each of them.
template <int kLanes, class T>
__device__ T sum_lanes(T x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

/// Whether every row of a matrix is whole, aligned groups of eight elements.
inline bool has_whole_eights(const MatrixView& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.cols % 8 == 0 &&
         m.stride * size_of(m.dtype) % 16 == 0;
}

/// Calls fn with a null pointer of the type that a dtype stands for.
template <class Fn>
void with_type(DType dtype, Fn fn) {
  dtype == DType::kF32 ? fn(static_cast<float*>(nullptr))
                       : fn(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace longspan::cuda
