#pragma once

#include <cstdint>

namespace longspan::cuda {

/// Threads of a block that works together on one row, and its warps.
inline constexpr int kBlockThreads = 1024;
inline constexpr int kBlockWarps = kBlockThreads / 32;

inline __device__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
inline __device__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

/// Sum over lanes 0 to this one.
inline __device__ uint64_t scan_lanes(uint64_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t below = __shfl_up_sync(0xffffffff, x, step);
    if (lane_index() >= step) x += below;
  }
  return x;
}

/// What a thread of the block learns of a sum over all.
struct BlockSum {
  uint64_t before = 0;  ///< over the threads before this one
  uint64_t total = 0;
};

/// Sums over the block's threads in their order. All threads call it; sums: shared [kBlockWarps].
inline __device__ BlockSum sum_block(uint64_t x, uint64_t* sums) {
  const uint64_t up_to = scan_lanes(x);
  __syncthreads();  // readers of an earlier call are done
  if (lane_index() == 31) sums[warp_index()] = up_to;
  __syncthreads();
  const uint64_t warps = scan_lanes(sums[lane_index()]);
  const uint64_t own = __shfl_sync(0xffffffff, warps, warp_index());
  return {own - sums[warp_index()] + up_to - x, __shfl_sync(0xffffffff, warps, 31)};
}

/// The largest over the block's threads.
inline __device__ uint64_t max_block(uint64_t x, uint64_t* sums) {
  const auto max_lanes = [](uint64_t y) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) y = max(y, __shfl_xor_sync(0xffffffff, y, step));
    return y;
  };
  x = max_lanes(x);
  __syncthreads();
  if (lane_index() == 0) sums[warp_index()] = x;
  __syncthreads();
  return max_lanes(sums[lane_index()]);
}

}  // namespace longspan::cuda
