#include "backend/cpu/convert.h"

#include <cstring>

namespace longspan::cpu {
namespace {

/// IEEE binary16 to binary32.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fU;
  const uint32_t fraction = half & 0x3ffU;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t rebased = exponent == 0x1fU ? 0xffU : exponent + 112;  // 127 - 15
  return std::bit_cast<float>(sign | (rebased << 23) | (fraction << 13));
}

}  // namespace

void read_floats(const WeightView& view, int64_t row, float* out) {
  const void* data = view.row(row);
  if (view.dtype == DType::kF32) {
    std::memcpy(out, data, static_cast<size_t>(view.cols) * 4);  // a file need not be aligned
    return;
  }
  const char* bytes = static_cast<const char*>(data);
  for (int64_t i = 0; i < view.cols; ++i) {
    uint16_t bits;
    std::memcpy(&bits, bytes + 2 * i, 2);
    out[i] = view.dtype == DType::kBF16 ? to_float(bits) : half_to_float(bits);
  }
}

}  // namespace longspan::cpu
