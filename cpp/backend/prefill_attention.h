#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace longspan {

/// What the products of queries and keys, and of weights and values, are formed in, in attention of
/// many rows at once.
enum class PrefillAttention : uint8_t {
  kNative,  ///< the backend's activation dtype
  kInt8,  ///< signed bytes: queries by row and head, keys by panel and head; weights, values as is
  kInt8Fp8,  ///< the same, and weights and values in e4m3, summed up in float32 every few tokens
};

/// Each by its name in EngineConfig::prefill_attention, in the order of the enumerators.
inline constexpr std::array<std::string_view, 3> kPrefillAttentionNames = {"auto", "int8",
                                                                           "int8_fp8"};

constexpr std::string_view name_of(PrefillAttention attention) {
  return kPrefillAttentionNames[static_cast<size_t>(attention)];
}

}  // namespace longspan
