#pragma once

#include <bit>
#include <cstdint>

namespace longspan {

/// IEEE 754 binary16 to binary32, exactly: subnormals, infinities and NaNs included. No branch, so
/// that compilers vectorise loops of it.
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000U} << 16;
  // The exponent's bias differs by 112; a product with 2^112 also puts subnormals right.
  const float scaled = std::bit_cast<float>(uint32_t{bits & 0x7fffU} << 13) * 0x1p112F;
  const uint32_t special = (bits & 0x7c00U) == 0x7c00U ? 0x7f800000U : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

}  // namespace longspan
