#pragma once

#include <cstdint>

#include "backend/cpu/kv_tiles.h"

namespace longspan::cpu {

/// Tokens of one sequence within one key tile, under one KV head: norm and rotate q and k, append
/// k and v.
/// Rows of q, k and v are `stride` floats apart; q holds the group's heads one after another.
struct RotateTask {
  int64_t count = 0;      ///< tokens
  int64_t first_key = 0;  ///< key within the tile of the first token
  int64_t group = 0;
  int64_t head_dim = 0;
  int64_t rotary_pairs = 0;        ///< <= head_dim / 2
  const float* cos = nullptr;      ///< [count][rotary_pairs]
  const float* sin = nullptr;      ///< [count][rotary_pairs]
  const float* q_scale = nullptr;  ///< [count], of the query
  float rotated_scale = 1;         ///< also of the query's rotated dims
  const float* q = nullptr;        ///< [count][group * head_dim]
  const float* k = nullptr;        ///< [count][head_dim]
  const float* v = nullptr;        ///< [count][head_dim]
  int64_t stride = 0;
  const float* q_norm = nullptr;  ///< [head_dim] or null: no norm
  const float* k_norm = nullptr;  ///< [head_dim] or null: no norm
  float norm_eps = 0;
  void* q_out = nullptr;  ///< act [count][group * head_dim], tokens q_stride elements apart
  int64_t q_stride = 0;
  const KvTiles* tiles = nullptr;
  bool turn_heads = false;  ///< see turns_heads
  void* k_tile = nullptr;   ///< null: k and v are another rank's to append
  void* v_tile = nullptr;
  float* scratch = nullptr;  ///< [kKeyTile + 1][head_dim]
};

}  // namespace longspan::cpu
