#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda_check.cuh"
#include "cuda_number.cuh"

/// Queries, keys and values of one sequence that make attention hard to get right. All about
/// standard normal, and besides: four dims far from zero in every key; a first key, of value 0,
/// that all queries look at; every other query near to one key somewhere before it. So a row
/// attends to one key, or to the first and hundreds of thousands of others. A number is a function
/// of its layer, position, head and dim alone.
namespace longspan::cuda::bench {

/// Rows of a layer: [num_rows][(num_heads + 2 num_kv_heads) * 128], q | k | v.
struct RowsWanted {
  int32_t layer = 0;
  int64_t first_position = 0;
  int64_t num_rows = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  bool with_queries = false;  ///< else those are left as they are
};

__device__ inline float normal(uint32_t what, uint32_t layer, uint32_t token, uint32_t head,
                               uint32_t col) {
  float sum = 0;
  for (uint32_t i = 0; i < 4; ++i) sum += number(what + 16 * i, layer, token, head, col);
  return 0.866F * sum;
}

/// Blocks: [row]; a thread has a dim.
static __global__ void make_rows_kernel(RowsWanted wanted, __nv_bfloat16* rows) {
  constexpr uint32_t kDim = 128;
  constexpr float kTowardsNeedle = 1.75F;  // of the key: 20 of score, against ln of a million, 14
  const auto layer = static_cast<uint32_t>(wanted.layer);
  const auto position = static_cast<uint32_t>(wanted.first_position + blockIdx.x);
  const uint32_t c = threadIdx.x;
  const auto heads = static_cast<uint32_t>(wanted.num_heads);
  const auto kv_heads = static_cast<uint32_t>(wanted.num_kv_heads);
  __nv_bfloat16* row = rows + int64_t{blockIdx.x} * (heads + 2 * kv_heads) * kDim;
  for (uint32_t h = wanted.with_queries ? 0 : heads; h < heads + 2 * kv_heads; ++h) {
    float x = 0;
    if (h < heads) {
      x = normal(3, layer, position, h, c);
      if (c % 16 == 3) x += 2.5F;
      if (position % 2 == 0) {
        const uint32_t needle = (position * 7919U + h * 104729U + layer * 15485863U) % position;
        x += kTowardsNeedle * normal(1, layer, needle, h / (heads / kv_heads), c);
      }
    } else if (h < heads + kv_heads) {
      x = normal(1, layer, position, h - heads, c);
      if (position == 0) {
        x = c % 16 == 3 ? 8 + x : 0.1F * x;
      } else if (c % 32 == 5) {
        x += c % 64 == 5 ? 10.0F : -7.0F;
      }
    } else if (position != 0) {
      x = normal(2, layer, position, h - heads - kv_heads, c);
    }
    row[h * kDim + c] = __float2bfloat16(x);
  }
}

inline void make_rows(const RowsWanted& wanted, __nv_bfloat16* rows) {
  make_rows_kernel<<<static_cast<unsigned>(wanted.num_rows), 128>>>(wanted, rows);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace longspan::cuda::bench
