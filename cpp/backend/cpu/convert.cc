#include "backend/cpu/convert.h"

#include <cstring>

#include "core/float16.h"

namespace longspan::cpu {

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
