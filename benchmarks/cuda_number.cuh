#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace longspan::cuda::bench {

/// A number of [-1, 1) that depends on every argument; what: 0 query, 1 key, 2 value.
__host__ __device__ inline float number(uint32_t what, uint32_t seq, uint32_t token, uint32_t head,
                                        uint32_t col) {
  uint32_t h = what * 0x9e3779b9U;
  for (const uint32_t x : {seq, token, head, col}) {
    h = (h ^ x) * 0x85ebca6bU;
    h ^= h >> 15;
  }
  h *= 0xc2b2ae35U;
  h ^= h >> 16;
  return static_cast<float>(h >> 8) * 0x1p-23F - 1.0F;
}

}  // namespace longspan::cuda::bench
