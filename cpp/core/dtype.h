#pragma once

#include <cstdint>
#include <string_view>

namespace longspan {

enum class DType : uint8_t { kF32, kF16, kBF16 };

/// Bytes per element.
constexpr int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF16:
      return "float16";
    default:
      return "bfloat16";
  }
}

}  // namespace longspan
