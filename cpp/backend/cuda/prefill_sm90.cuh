#pragma once

#include "backend/cuda/attention_prefill_sm90.h"
#include "backend/cuda/prefill_softmax.cuh"
#include "backend/cuda/sm90.cuh"

/// What the prefill kernels of sm_90a share: who does what, the way of the queries and of the
/// output. A cluster of two thread blocks goes through tiles that need the same keys. In a thread
/// block warpgroup 0 brings data: its warp 0 keys and values, its warps 1 to kConsumers the queries
/// of that consumer. Warpgroups 1 to kConsumers compute, 64 rows each.
namespace longspan::cuda {

constexpr int kCluster = 2;  // thread blocks that share keys and values
constexpr int kKeys = 128;   // of a step
constexpr int kWarpgroup = 128;

/// The shape of a thread block's work.
template <int head_dim>
struct PrefillShape {
  static constexpr int kHeadDim = head_dim;
  static constexpr int kRows = prefill_rows_sm90(head_dim);
  static constexpr int kConsumers = kRows / 64;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kChunks = head_dim / 8;           // of 16 bytes, in a row of bfloat16
  static constexpr int kPanels = head_dim / kPanelCols;  // in a row of bfloat16
  static constexpr int kQueryBytes = 64 * head_dim * 2;  // of a consumer
};

/// What a consumer must know of its 64 rows. Where 8 bytes more move the barriers behind it, the
/// kernel of bytes is 5 % slower.
struct Rows {
  int64_t out;          ///< offset of the first row in elements
  int64_t log_sum_exp;  ///< the same
  int32_t num_keys;     ///< of the tile; 0: no more work
  int32_t num_rows;     ///< to be written
  int32_t position;     ///< of the first row
  float scale_log2;

  /// Tiles of keys to go through, the last first.
  __device__ int num_steps() const { return (num_keys + kKeys - 1) / kKeys; }

  /// Keys of the tile that row r sees.
  __device__ int sees(const ContextShard& context, int r) const {
    return min(context.keys(position + r + 1), num_keys);
  }
};
static_assert(sizeof(Rows) == 32);

/// In shared memory, the bfloat16 queries of each consumer, [kPanels][64][64] in the 128-byte
/// swizzle, of two tiles in turn.
template <class S>
using QueryBuffers = char[2][S::kConsumers][S::kQueryBytes];

/// Whose turn it is at them, and which rows they are.
template <class S>
struct QueryTurns {
  Rows rows[2][S::kConsumers];
  uint64_t full[2][S::kConsumers];
  uint64_t empty[2][S::kConsumers];

  __device__ void init() {
    for (int i = 0; i < 2; ++i) {
      for (int c = 0; c < S::kConsumers; ++c) {
        mbarrier_init(smem_address(&full[i][c]), 32);
        mbarrier_init(smem_address(&empty[i][c]), kWarpgroup);
      }
    }
  }
};

/// Of a ring of slots, the one whose turn it is.
template <int kSlots>
struct Turn {
  int slot = 0;
  uint32_t parity = 0;
  __device__ int next() {
    const int now = slot;
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
    return now;
  }
};

/// The barriers of a ring of slots that copies fill and that every warp of so many consumers of
/// either thread block releases. By one thread.
template <int kSlots>
__device__ void init_ring(uint64_t (&full)[kSlots], uint64_t (&empty)[kSlots], int consumers) {
  for (int i = 0; i < kSlots; ++i) {
    mbarrier_init(smem_address(&full[i]), 1);
    mbarrier_init(smem_address(&empty[i]), kCluster * consumers * 4);
  }
}

/// A tile of this thread block.
struct Tile {
  SeqView seq;
  int head;
  int row;
  int num_keys;  ///< that the cluster goes through
};

template <class S>
__device__ Tile tile_of(const AttentionArgs& args, const PrefillTile& scheduled, int rank) {
  Tile tile{args.plan.seqs[scheduled.seq], scheduled.head, scheduled.row, 0};
  int rows = S::kRows;
  if (args.num_heads / args.kv.num_kv_heads % 2 == 0) {
    tile.head += rank;
  } else {
    tile.row += rank * S::kRows;
    rows *= 2;
  }
  tile.num_keys = args.plan.context.keys(static_cast<int>(tile.seq.first_position) +
                                         min(scheduled.row + rows, tile.seq.num_rows));
  return tile;
}

/// A tile ahead of the consumer. Rows that do not exist are zero.
template <class S>
__device__ void bring_queries(const AttentionArgs& args, const PrefillWorkSm90& work,
                              QueryBuffers<S>& buffers, QueryTurns<S>& turns, int rank,
                              int consumer) {
  constexpr int kRowsAtOnce = 32 / S::kChunks;
  const int lane = threadIdx.x % 32;
  const int cluster = blockIdx.x / kCluster;
  const int begin = work.first[cluster];
  const int count = work.first[cluster + 1] - begin;
  for (int t = 0; t <= count; ++t) {
    const int buffer = t % 2;
    Rows rows{};
    const __nv_bfloat16* from = nullptr;
    if (t < count) {
      const Tile tile = tile_of<S>(args, work.tiles[begin + t], rank);
      const int row = tile.row + 64 * consumer;
      rows.num_keys = tile.num_keys;
      rows.num_rows = max(0, min(64, tile.seq.num_rows - row));
      rows.position = static_cast<int>(tile.seq.first_position) + row;
      rows.out = (tile.seq.first_row + row) * args.out_stride + tile.head * S::kHeadDim;
      rows.log_sum_exp = (tile.seq.first_row + row) * args.log_sum_exp_stride + tile.head;
      rows.scale_log2 = tile.seq.scale_log2;
      // Where none of the rows exists, `from` is not read.
      from = args.q + (tile.seq.first_row + (rows.num_rows > 0 ? row : 0)) * args.q_stride +
             tile.head * S::kHeadDim + lane % S::kChunks * 8;
    }
    mbarrier_wait_amid(smem_address(&turns.empty[buffer][consumer]), t / 2 % 2 ^ 1);
    if (lane == 0) turns.rows[buffer][consumer] = rows;
    if (t < count) {
      const int chunk = lane % S::kChunks;
      const uint32_t to = smem_address(buffers[buffer][consumer]) + chunk / 8 * kPanelBytes;
#pragma unroll 8
      for (int r = lane / S::kChunks; r < 64; r += kRowsAtOnce) {
        const bool exists = r < rows.num_rows;
        cp_async(to + swizzle(r, chunk % 8), from + (exists ? r : 0) * args.q_stride, exists);
      }
      cp_async_commit();
      cp_async_wait<0>();
      fence_async_proxy();
    }
    mbarrier_arrive(smem_address(&turns.full[buffer][consumer]));
  }
}

/// o += p v of a step.
template <int kCount>
__device__ inline void multiply_values(float (&o)[kCount], const uint32_t (&p)[kKeys / 16][4],
                                       uint64_t v) {
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    wgmma_rs<true, true>(o, p[i], wgmma_advance(v, i * 16 * 128));
  }
}

/// Writes a warp's 16 rows by way of their place among the queries, which are done with.
template <class S>
__device__ inline void write_rows(const AttentionArgs& args, const Rows& rows,
                                  const float (&o)[S::kHeadDim / 2], const float (&inverse)[2],
                                  char* staging) {
  const int lane = threadIdx.x % 32;
  const int first = threadIdx.x % kWarpgroup / 32 * 16;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      char* to = staging + j / 8 * kPanelBytes + swizzle(first + lane / 4 + 8 * h, j % 8);
      reinterpret_cast<uint32_t*>(to)[lane % 4] =
          pack_bf16(o[4 * j + 2 * h] * inverse[h], o[4 * j + 2 * h + 1] * inverse[h]);
    }
  }
  __syncwarp();
  const int chunk = lane % S::kChunks;
  const char* from = staging + chunk / 8 * kPanelBytes;
  __nv_bfloat16* out = args.out + rows.out + chunk * 8;
#pragma unroll
  for (int i = 0; i < 16; i += 32 / S::kChunks) {
    const int r = first + i + lane / S::kChunks;
    if (r >= rows.num_rows) break;
    *reinterpret_cast<uint4*>(out + r * args.out_stride) =
        *reinterpret_cast<const uint4*>(from + swizzle(r, chunk % 8));
  }
  __syncwarp();
}

/// Launches a kernel of the clusters' shared memory and threads.
template <class... Params, class... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), int num_clusters, int threads,
                            size_t smem_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_clusters * kCluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

/// What the warps of a cluster's thread block do once its barriers are there: the first four
/// produce(), the others, of more registers, compute().
template <int kProducerRegisters, int kConsumerRegisters, class Produce, class Compute>
__device__ void take_roles(const Produce& produce, const Compute& compute) {
  cluster_sync();
  // The same in all lanes, which the compiler is to know.
  const auto warp = static_cast<int>(__shfl_sync(0xffffffffU, threadIdx.x / 32, 0));
  if (warp < 4) {
    give_registers<kProducerRegisters>();
    produce(warp);
  } else {
    take_registers<kConsumerRegisters>();
    compute(warp / 4 - 1);
  }
  cluster_sync();  // neither thread block ends while the other may write to it
}

/// The same of a prefill kernel: one warp brings keys and values by bring(), one to each consumer
/// its queries.
template <class S, class Shared, class Bring, class Compute>
__device__ void take_prefill_roles(const AttentionArgs& args, const PrefillWorkSm90& work,
                                   Shared& shared, int rank, const Bring& bring,
                                   const Compute& compute) {
  const auto produce = [&](int warp) {
    if (warp == 0) {
      bring();
    } else if (warp <= S::kConsumers) {
      bring_queries<S>(args, work, shared.queries, shared.query_turns, rank, warp - 1);
    }
  };
  take_roles<S::kProducerRegisters, S::kConsumerRegisters>(produce, compute);
}

}  // namespace longspan::cuda
