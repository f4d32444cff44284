#pragma once

#include <bit>
#include <cstdint>

#include "backend/cpu/panel.h"
#include "core/matrix.h"

namespace longspan::cpu {

/// float32 to the activation dtype: bfloat16 rounds to nearest even, a NaN stays one.
template <class T>
inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    const auto bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<T>((bits >> 16) | 0x40U);
    return static_cast<T>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
  }
}

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

/// One row of a checkpoint's tensor as float32 [cols]; exact for every dtype.
void read_floats(const WeightView& view, int64_t row, float* out);

}  // namespace longspan::cpu
