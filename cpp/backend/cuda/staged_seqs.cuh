#pragma once

#include <cstdint>

#include "backend/cuda/quantize_args.h"

namespace longspan::cuda {

/// The index of the sequence that has a panel of a workspace of prefills. staged: the sequences as
/// the workspace has them, each from the panel `table` on; seqs: [num_seqs], those of the pass,
/// `table` growing.
__device__ inline int seq_of_panel(const SeqView* staged, const int32_t* seqs, int num_seqs,
                                   int panel) {
  int low = 0;
  for (int high = num_seqs; high - low > 1;) {
    const int middle = (low + high) / 2;
    (staged[seqs[middle]].table <= panel ? low : high) = middle;
  }
  return seqs[low];
}

/// A sequence's keys or values of a head in the cache.
class CachedRows {
 public:
  /// tile: where they are in a block, from.key or from.value.
  template <class To>
  __device__ CachedRows(const QuantizeArgs<To>& args, const KvTile& tile, int seq, int kv_head)
      : kv_(args.from),
        tile_(tile),
        table_(args.plan.block_tables + args.plan.seqs[seq].table),
        base_(args.from.key_tile(0, args.layer, kv_head) + tile.offset),
        count_(static_cast<int>(args.plan.seqs[seq].first_position) +
               args.plan.seqs[seq].num_rows) {}

  __device__ int count() const { return count_; }
  /// Chunk `chunk` of 16 bytes of a row.
  __device__ const char* at(int row, int chunk) const {
    return base_ + table_[row / kv_.block_len] * kv_.block_bytes +
           tile_.chunk_offset(row % kv_.block_len, chunk);
  }

 private:
  const KvLayout& kv_;
  const KvTile& tile_;
  const int32_t* table_;
  const char* base_;
  int count_;
};

/// The largest x of a block of kThreads. For all threads to call, once in a kernel.
template <int kThreads>
__device__ inline float largest_of_block(float x) {
  __shared__ float of_warps[kThreads / 32];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, step));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (const float other : of_warps) x = fmaxf(x, other);
  return x;
}

}  // namespace longspan::cuda
