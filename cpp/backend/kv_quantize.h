#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "backend/kv_cache.h"

/// What the formats of the KV cache mean in numbers, one row (the key or the value of one token
/// under one head, float32 [head_dim]) at a time. Every backend makes the same codes and parameters
/// bit for bit; where it keeps them is its own. A row is quantised once, when it is appended.
///   int8:  x ~ scale q, -127 <= q <= 127; scale = max |x| / 127, rounded up to bfloat16;
///   int6:  likewise, -31 <= q <= 31; scale = max |x| / 31;
///   e4m3:  x ~ scale q, |q| <= 448; scale = max |x| / 448, rounded up to bfloat16;
///   int4:  by groups of kInt4Group dims, the last one of what is left: x ~ zero + scale q,
///          0 <= q <= 15; zero = min x, rounded down to bfloat16, scale = (max x - zero) / 15,
///          rounded up.
/// Scales round up so that no code saturates, and are kLeastScale at least, so that a row of zeros
/// needs no case of its own. A row (of int4: a group) with an infinity or a NaN gets a NaN as scale
/// and codes 0: what is made of it is a NaN, as it would be without quantisation.
namespace longspan {

/// How elements are held.
enum class KvElement : uint8_t { kNative, kInt8, kFp8, kInt6, kInt4 };

constexpr KvElement key_element(KvFormat format) {
  switch (format) {
    case KvFormat::kInt8:
    case KvFormat::kInt8Fp8:
    case KvFormat::kInt8Int4:
      return KvElement::kInt8;
    case KvFormat::kFp8:
      return KvElement::kFp8;
    case KvFormat::kInt4:
      return KvElement::kInt6;
    case KvFormat::kNative:
      break;
  }
  return KvElement::kNative;
}

constexpr KvElement value_element(KvFormat format) {
  switch (format) {
    case KvFormat::kInt8:
      return KvElement::kInt8;
    case KvFormat::kFp8:
    case KvFormat::kInt8Fp8:
      return KvElement::kFp8;
    case KvFormat::kInt8Int4:
    case KvFormat::kInt4:
      return KvElement::kInt4;
    case KvFormat::kNative:
      break;
  }
  return KvElement::kNative;
}

/// The largest magnitude of a code of int8, int6 or e4m3.
constexpr float largest_code(KvElement element) {
  return element == KvElement::kInt8 ? 127.0F : element == KvElement::kInt6 ? 31.0F : 448.0F;
}

/// Dims of a group that shares a scale and a zero in int4.
inline constexpr int64_t kInt4Group = 32;

/// Groups of a row in int4.
constexpr int64_t int4_groups(int64_t head_dim) { return (head_dim + kInt4Group - 1) / kInt4Group; }

/// The least scale: its reciprocal is finite.
inline constexpr float kLeastScale = 0x1p-126F;

/// The bits of the least bfloat16 >= x, x >= 0 and finite.
constexpr uint16_t bf16_above(float x) {
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + 0xffffU) >> 16);
}

/// The bits of the largest bfloat16 <= x, finite.
constexpr uint16_t bf16_below(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((x < 0 ? bits + 0xffffU : bits) >> 16);
}

constexpr float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline constexpr uint16_t kBf16NaN = 0x7fc0;

/// max |x|; not finite when an element is not.
inline float largest_magnitude(const float* x, int64_t n) {
  uint32_t most = 0;  // bits order as magnitudes do, with infinity and NaN above all others
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::bit_cast<uint32_t>(x[i]) << 1 >> 1);
  return std::bit_cast<float>(most);
}

/// The scale of a row whose codes go to `largest` in magnitude.
inline uint16_t symmetric_scale(float magnitude, float largest) {
  if (!std::isfinite(magnitude)) return kBf16NaN;
  return bf16_above(std::max(magnitude / largest, kLeastScale));
}

/// Codes [n] of a row, code(x (1 / scale)), each step rounded to float32; returns the scale.
template <class Code, class MakeCode>
uint16_t quantize_symmetric(const float* x, int64_t n, float largest, Code* codes, MakeCode code) {
  const uint16_t scale = symmetric_scale(largest_magnitude(x, n), largest);
  if (scale == kBf16NaN) {
    std::fill(codes, codes + n, Code{0});
    return scale;
  }
  const float inverse = 1.0F / bf16_to_float(scale);
  for (int64_t i = 0; i < n; ++i) codes[i] = code(x[i] * inverse);
  return scale;
}

/// Codes [n] of a row as int8 or int6, to the nearest integer, ties to even; returns its scale.
inline uint16_t quantize_integers(KvElement element, const float* x, int64_t n, int8_t* codes) {
  return quantize_symmetric(x, n, largest_code(element), codes,
                            [](float y) { return static_cast<int8_t>(std::rint(y)); });
}

/// x as e4m3 (OCP 8-bit floating point: 4 exponent bits, bias 7, 3 fraction bits, no infinity) to
/// nearest, ties to even; |x| <= 448.
inline uint8_t to_e4m3(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffU;
  const uint32_t rounded = magnitude + 0x7ffffU + ((magnitude >> 20) & 1U);
  const uint32_t normal = (rounded >> 20) - (uint32_t{127 - 7} << 3);
  // Below 2^-6 codes count in steps of 2^-9.
  const float small = std::bit_cast<float>(std::min(magnitude, std::bit_cast<uint32_t>(0x1p-6F)));
  const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(std::rint(small * 0x1p9F)));
  const bool is_normal = magnitude >= std::bit_cast<uint32_t>(0x1p-6F);
  return static_cast<uint8_t>((is_normal ? normal : subnormal) | ((bits >> 24) & 0x80U));
}

/// The value of an e4m3 other than its NaN: its bits as those of a float32 whose exponent is 120
/// too small.
inline float from_e4m3(uint8_t code) {
  const uint32_t bits = (code & 0x7fU) << 20 | (code & 0x80U) << 24;
  return std::bit_cast<float>(bits) * 0x1p120F;
}

/// Codes [n] of a row as e4m3; returns its scale.
inline uint16_t quantize_fp8(const float* x, int64_t n, uint8_t* codes) {
  return quantize_symmetric(x, n, largest_code(KvElement::kFp8), codes, to_e4m3);
}

/// Of a group: bfloat16 bits.
struct Int4Parameters {
  uint16_t scale = 0;
  uint16_t zero = 0;
};

/// Codes [n], 0 to 15, one a byte, of a group of n <= kInt4Group elements.
/// q = (x - zero) (1 / scale), each step rounded to float32, to the nearest integer, ties to even.
inline Int4Parameters quantize_int4(const float* x, int64_t n, uint8_t* codes) {
  if (!std::isfinite(largest_magnitude(x, n))) {
    std::fill(codes, codes + n, uint8_t{0});
    return {kBf16NaN, 0};
  }
  const auto [least, most] = std::minmax_element(x, x + n);
  Int4Parameters parameters;
  parameters.zero = bf16_below(*least);
  const float zero = bf16_to_float(parameters.zero);
  // Each by itself, since the difference of finite numbers need not be finite.
  parameters.scale = bf16_above(std::max(*most / 15.0F - zero / 15.0F, kLeastScale));
  const float inverse = 1.0F / bf16_to_float(parameters.scale);
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = static_cast<uint8_t>(std::rint(std::min((x[i] - zero) * inverse, 15.0F)));
  }
  return parameters;
}

/// Whether heads of q and k are turned by turn_head() after RoPE, which leaves q k what it was.
/// Keys in integers gain by it since it spreads a dim that stands out, which would set the step of
/// all that share its scale; those of e4m3, whose steps are relative to each element, since dims
/// that stand out do so in q and k alike, where an error counts most.
constexpr bool turns_heads(KvFormat format) { return key_element(format) != KvElement::kNative; }

/// x times an orthonormal Hadamard matrix, its own inverse, for n a power of two.
inline void hadamard(float* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t i = 0; i < n; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const float a = x[j];
        const float b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  const float scale = 1.0F / std::sqrt(static_cast<float>(n));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

/// Each run of as many dims as the largest power of two that divides head_dim, times the matrix.
inline void turn_head(float* x, int64_t head_dim) {
  const int64_t run = head_dim & -head_dim;
  for (int64_t first = 0; first < head_dim; first += run) hadamard(x + first, run);
}

}  // namespace longspan
