#include <algorithm>
#include <cstring>

#include "checkpoint/checkpoint.h"
#include "core/check.h"

namespace longspan {
namespace {

/// A value is not finite when its exponent bits are all ones. Adding the lowest exponent bit to the
/// exponent field alone then carries into the sign's place, so one 64-bit addition tests two floats
/// or four halves, and no carry leaves its element.
struct ExponentTest {
  uint64_t exponent;  ///< exponent bits of each element in a word
  uint64_t lowest;    ///< the lowest of them
  uint64_t carry;     ///< the sign's place

  uint64_t operator()(uint64_t word) const { return ((word & exponent) + lowest) & carry; }
};

ExponentTest test_for(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {0x7F8000007F800000U, 0x0080000000800000U, 0x8000000080000000U};
    case DType::kF16:
      return {0x7C007C007C007C00U, 0x0400040004000400U, 0x8000800080008000U};
    default:
      return {0x7F807F807F807F80U, 0x0080008000800080U, 0x8000800080008000U};
  }
}

/// Bytes are tested in blocks without a branch inside, so that compilers vectorise the loop.
constexpr int64_t kBlockBytes = 4096;

bool all_finite(const char* data, int64_t bytes, const ExponentTest& test) {
  uint64_t bad = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + i, sizeof(word));
    bad |= test(word);
  }
  uint64_t rest = 0;
  std::memcpy(&rest, data + i, static_cast<size_t>(bytes - i));
  return (bad | test(rest)) == 0;
}

/// The index of the first bad element of a row, or -1.
int64_t first_bad(const char* row, int64_t cols, DType dtype) {
  const ExponentTest test = test_for(dtype);
  const int64_t size = size_of(dtype);
  const int64_t bytes = cols * size;
  for (int64_t begin = 0; begin < bytes; begin += kBlockBytes) {
    const int64_t end = std::min(begin + kBlockBytes, bytes);
    if (all_finite(row + begin, end - begin, test)) continue;
    for (int64_t i = begin; i < end; i += size) {
      if (!all_finite(row + i, size, test)) return i / size;
    }
  }
  return -1;
}

}  // namespace

void check_finite(const WeightView& tensor) {
  const bool packed = tensor.stride == tensor.cols;
  const int64_t rows = packed ? 1 : tensor.rows;
  const int64_t cols = packed ? tensor.rows * tensor.cols : tensor.cols;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t index = first_bad(static_cast<const char*>(tensor.row(r)), cols, tensor.dtype);
    require<CheckpointError>(
        index < 0, tensor.name, ": expected finite values, got NaN or infinity ", "at [",
        packed ? index / tensor.cols : r, ", ", packed ? index % tensor.cols : index, "]");
  }
}

}  // namespace longspan
