#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace longspan {

/// A view of rows x cols elements, row-major, rows `stride` elements apart. Owns nothing.
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  ///< elements between rows, >= cols

  template <class T>
  T* row(int64_t r) const {
    return static_cast<T*>(data) + r * stride;
  }

  /// A row of any dtype, cols * size_of(dtype) bytes.
  std::byte* row_bytes(int64_t r) const {
    return static_cast<std::byte*>(data) + r * stride * size_of(dtype);
  }

  /// Rows [begin, begin + count).
  MatrixView rows_from(int64_t begin, int64_t count) const {
    return {row_bytes(begin), dtype, count, cols, stride};
  }

  /// Columns [begin, begin + count).
  MatrixView cols_from(int64_t begin, int64_t count) const {
    return {static_cast<char*>(data) + begin * size_of(dtype), dtype, rows, count, stride};
  }
};

/// A read-only tensor of a checkpoint, or a slice of one: rows x cols of host memory, row-major.
/// A vector is one row. `name` is for error messages.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  ///< elements between rows
  std::string name;

  const void* row(int64_t r) const {
    return static_cast<const char*>(data) + r * stride * size_of(dtype);
  }
};

}  // namespace longspan
