#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace longspan {

/// What the linears of the layers hold their weights in and multiply in.
enum class LinearDType : uint8_t {
  kNative,  ///< the backend's activation dtype
  kInt8,    ///< signed bytes of turned rows: a float32 scale per output of a weight and per input
};

/// Each by its name in EngineConfig::linear_dtype, in the order of the enumerators.
inline constexpr std::array<std::string_view, 2> kLinearDTypeNames = {"auto", "int8"};

constexpr std::string_view name_of(LinearDType dtype) {
  return kLinearDTypeNames[static_cast<size_t>(dtype)];
}

}  // namespace longspan
