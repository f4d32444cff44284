#pragma once

#include <cstdint>

/// Numbers in eight bits: symmetric, some with one scale.
namespace longspan::cuda {

/// Zeros have this largest magnitude, so that a masked score times its scale stays minus infinity.
constexpr float kLeastMagnitude = 1e-12f;

struct Int8Scale {
  float scale;    ///< number = element * scale
  float inverse;  ///< element = number * inverse, rounded
};

__device__ inline Int8Scale int8_scale(float largest_magnitude) {
  const float largest = fmaxf(largest_magnitude, kLeastMagnitude);
  return {largest * (1.0f / 127.0f), 127.0f / largest};
}

/// sum + the squares of four signed bytes.
__device__ inline int add_squares(uint32_t four, int sum) {
  return __dp4a(static_cast<int>(four), static_cast<int>(four), sum);
}

/// Four numbers as bytes, the first lowest. Adding 1.5 * 2^23 rounds a float to an integer, which
/// is then in its low bits.
__device__ inline uint32_t to_int8(float a, float b, float c, float d, float inverse) {
  const auto rounded = [inverse](float x) { return __float_as_uint(fmaf(x, inverse, 0x1.8p23f)); };
  const uint32_t low = __byte_perm(rounded(a), rounded(b), 0x0040);
  const uint32_t high = __byte_perm(rounded(c), rounded(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

}  // namespace longspan::cuda
