#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "backend/cuda/kv_layout.h"

/// What KV elements are in registers: pairs of bfloat16. A code's number is exact in bfloat16; it
/// takes a few integer instructions and no conversion, of which a multiprocessor does few at a
/// time.
namespace longspan::cuda {

__device__ inline __nv_bfloat162 as_bf16x2(uint32_t bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}
__device__ inline uint32_t as_bits(__nv_bfloat162 x) {
  return *reinterpret_cast<const uint32_t*>(&x);
}
/// The bfloat16 of the low or the high half of a word, twice.
__device__ inline __nv_bfloat162 twice_low(uint32_t word) {
  return as_bf16x2(__byte_perm(word, 0, 0x1010));
}
__device__ inline __nv_bfloat162 twice_high(uint32_t word) {
  return as_bf16x2(__byte_perm(word, 0, 0x3232));
}

/// (a & mask) | bits, in one instruction: of two constants the compiler makes two otherwise.
__device__ inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}

/// Elements of half a word: widen() pairs element i of a word with element i + kHalfWord.
template <KvElement element>
inline constexpr int kHalfWord = 16 / bits_of(element);

/// The elements of a word as numbers: pairs[i] = {element i, element i + kHalfWord}, the first low.
template <KvElement element>
__device__ inline void widen(uint32_t word, uint32_t (&pairs)[kHalfWord<element>]) {
  if constexpr (element == KvElement::kInt8) {
    // Of a byte's seven low bits m, 128 + m is the bfloat16 0x4300 | m; its sign bit takes off 128
    // or, as 0x4380, 256.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t w = word >> (8 * i);
      pairs[i] = as_bits(__hsub2(as_bf16x2(and_or(w, 0x007f007f, 0x43004300)),
                                 as_bf16x2(and_or(w, 0x00800080, 0x43004300))));
    }
  } else if constexpr (element == KvElement::kFp8) {
    // Exponent and mantissa of e4m3 where bfloat16 has its own are the number, subnormal or not,
    // times 2^(7 - 127). (A NaN of e4m3 reads as 480: it is its scale that says so.)
    constexpr uint32_t kUnbias = 0x7b807b80;  // 2^120, twice
    pairs[0] = ((word << 4) & 0x07f007f0) | ((word << 8) & 0x80008000);
    pairs[1] = ((word >> 4) & 0x07f007f0) | (word & 0x80008000);
#pragma unroll
    for (uint32_t& pair : pairs) pair = as_bits(__hmul2(as_bf16x2(pair), as_bf16x2(kUnbias)));
  } else if constexpr (element == KvElement::kInt4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = as_bits(__hsub2(as_bf16x2(and_or(word >> (4 * i), 0x000f000f, 0x43004300)),
                                 as_bf16x2(0x43004300)));
    }
  } else {
    pairs[0] = word;
  }
}

/// The same of int6, given the word's high bits (KvTile).
__device__ inline void widen_int6(uint32_t word, uint32_t high, uint32_t (&pairs)[4]) {
  const uint32_t bits = __byte_perm(high, 0, 0x4140);  // of elements 4 on in the upper half
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int shift = 4 - KvTile::high_shift(i);
    const uint32_t upper = (shift < 0 ? bits >> -shift : bits << shift) & 0x00300030;
    // With its sign bit the other way a code is larger by 32.
    const uint32_t code = (((word >> (4 * i)) & 0x000f000f) | upper) ^ 0x00200020;
    pairs[i] = as_bits(__hsub2(as_bf16x2(code | 0x43004300), as_bf16x2(0x43204320)));
  }
}

/// Numbers of int6 as signed bytes, times 4, given their low and high bits: bytes[0] of the even
/// elements of the word, bytes[1] of the odd ones.
__device__ inline void bytes_of_int6(uint32_t word, uint32_t high, uint32_t (&bytes)[2]) {
  // Byte i: the bits of elements 2 i and 2 i + 1 at bits 6 and 4.
  const uint32_t twice = __byte_perm(high, 0, 0x1100);
  const uint32_t upper = ((twice << 4) & 0x00ff00ff) | (twice & 0xff00ff00);
  bytes[0] = ((word << 2) & 0x3c3c3c3c) | (upper & 0xc0c0c0c0);
  bytes[1] = ((word >> 2) & 0x3c3c3c3c) | ((upper << 2) & 0xc0c0c0c0);
}

/// Numbers of int4 as what they stand for: number * scale + zero, rounded once.
__device__ inline uint32_t scaled(uint32_t pair, __nv_bfloat162 scale, __nv_bfloat162 zero) {
  return as_bits(__hfma2(as_bf16x2(pair), scale, zero));
}

}  // namespace longspan::cuda
