#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "backend/context_shard.h"
#include "core/memory.h"

namespace longspan {

/// How the keys and values of a token are held: kv_quantize.h says what each means in numbers.
enum class KvFormat : uint8_t {
  kNative,    ///< the backend's activation dtype
  kInt8,      ///< int8 K and V
  kFp8,       ///< e4m3 K and V
  kInt8Fp8,   ///< int8 K, e4m3 V
  kInt8Int4,  ///< int8 K, int4 V
  kInt4,      ///< int4 K and V
};

/// Every format by its name in EngineConfig::kv_cache_dtype, in the order of the enumerators.
inline constexpr std::array<std::string_view, 6> kKvFormatNames = {"auto",     "int8",      "fp8",
                                                                   "int8_fp8", "int8_int4", "int4"};

constexpr std::string_view name_of(KvFormat format) {
  return kKvFormatNames[static_cast<size_t>(format)];
}

/// What one attention kind caches per token.
struct KvShape {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;  ///< of this rank
  int64_t head_dim = 0;
  int64_t block_len = 0;  ///< tokens per block: 64, 128 or 256
  KvFormat format = KvFormat::kNative;
  int32_t context_rank = 0;  ///< see ContextShard
  int32_t context_size = 1;

  ContextShard context() const {
    return {static_cast<int32_t>(block_len), context_rank, context_size};
  }
};

/// The block pool's memory: [num_blocks] blocks of block_bytes, each [layer][kv_head]{K tile, V
/// tile, quantisation parameters}, tiles aligned to 128 bytes. The order inside a tile, and of the
/// parameters, is the backend's own.
struct KvCache {
  Buffer pool;
  KvShape shape;
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
};

}  // namespace longspan
