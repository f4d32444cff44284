#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace longspan {

/// What the products of queries and keys are formed in, in attention of many rows at once.
enum class PrefillAttention : uint8_t {
  kNative,  ///< the backend's activation dtype
  kInt8,    ///< signed bytes: queries by row and head, keys by token and head
};

/// Each by its name in EngineConfig::prefill_attention, in the order of the enumerators.
inline constexpr std::array<std::string_view, 2> kPrefillAttentionNames = {"auto", "int8"};

constexpr std::string_view name_of(PrefillAttention attention) {
  return kPrefillAttentionNames[static_cast<size_t>(attention)];
}

}  // namespace longspan
