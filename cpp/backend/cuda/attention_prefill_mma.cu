#include "backend/cuda/attention_prefill_mma.h"
#include "backend/cuda/mma.cuh"
#include "backend/cuda/prefill_tiles.h"

namespace longspan::cuda {
namespace {

/// The tile of a head size, in multiples of 16 columns. A warp takes 32 rows where its registers
/// hold their sums, which halves what it reads of shared memory per product; else 16.
template <int kColTiles_, int kKeys_>
struct Tile {
  static constexpr int kColTiles = kColTiles_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kRows = kPrefillRows;
  static constexpr int kPanels = (kColTiles + 3) / 4;
  static constexpr int kRowTiles = kColTiles <= 8 ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kWarps = kRows / (16 * kRowTiles);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = kColTiles <= 8 ? 2 : 1;
  // Shared memory, in panels of 128-byte rows, swizzled: queries, keys, values.
  static constexpr int kQueryPanel = kRows * 128;
  static constexpr int kKeyPanel = kKeys * 128;
  static constexpr int kSmem = kPanels * (kQueryPanel + 2 * kKeyPanel);
};

/// Starts copying the keys (or values, `from_tile` bytes further) [first, first + kKeys) of a KV
/// head to shared memory. Those beyond num_keys become zero: 0 times what stands there need not be.
template <class T>
__device__ void load_keys(const AttentionArgs& args, const int32_t* table, int kv_head,
                          int64_t from_tile, int first, int num_keys, uint32_t to) {
  const int block_len = args.kv.block_len;
  const int in_block = first % block_len;
  const char* from = args.kv.key_tile(__ldg(table + first / block_len), args.layer, kv_head) +
                     from_tile + in_block / kPanelTokens * (T::kPanels * kPanelBytes) +
                     in_block % kPanelTokens * 128;
#pragma unroll
  for (int i = threadIdx.x * 16; i < T::kPanels * T::kKeyPanel; i += T::kThreads * 16) {
    const int panel = i / T::kKeyPanel;
    const int byte = i % T::kKeyPanel;
    cp_async(to + i, from + panel * kPanelBytes + byte, first + byte / 128 < num_keys);
  }
}

/// Starts copying the queries of a tile; rows beyond num_rows and columns beyond head_dim are zero.
template <class T>
__device__ void load_queries(const AttentionArgs& args, const __nv_bfloat16* from, int num_rows,
                             uint32_t to) {
#pragma unroll 4
  for (int i = threadIdx.x; i < T::kRows * T::kPanels * 8; i += T::kThreads) {
    const int row = i / (T::kPanels * 8);
    const int chunk = i % (T::kPanels * 8);
    const bool valid = row < num_rows && chunk * 8 < args.kv.head_dim;
    cp_async(to + chunk / 8 * T::kQueryPanel + swizzle(row, chunk % 8),
             valid ? from + row * args.q_stride + chunk * 8 : from, valid);
  }
}

/// Online softmax of a warp's rows. A lane holds rows lane / 4 + 8 r of each row tile; `sum` is of
/// its own keys only.
template <class T>
struct Softmax {
  float out[T::kRowTiles][T::kColTiles * 2][4] =
      {};  // [..][n][..] columns 8 n + lane % 4 * 2 + {0, 1}
  float max[T::kRowTiles][2];
  float sum[T::kRowTiles][2] = {};

  __device__ Softmax() {
    for (auto& m : max) m[0] = m[1] = -INFINITY;
  }

  /// Takes the products of the next keys, the first of them seen by every row that sees any, and
  /// leaves weights; NaN to a row that sees none (clear_unseeing_rows).
  __device__ void weigh(float (&scores)[T::kRowTiles][T::kKeys / 8][4], float scale) {
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t) {
      float rescale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float m = max[t][r];
#pragma unroll
        for (auto& s : scores[t]) m = fmaxf(m, fmaxf(s[2 * r], s[2 * r + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0U, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0U, m, 2));
        rescale[r] = exp2_approx((max[t][r] - m) * scale);
        max[t][r] = m;
        float total = 0;
#pragma unroll
        for (auto& s : scores[t]) {
          s[2 * r] = exp2_approx(fmaf(s[2 * r], scale, -m * scale));
          s[2 * r + 1] = exp2_approx(fmaf(s[2 * r + 1], scale, -m * scale));
          total += s[2 * r] + s[2 * r + 1];
        }
        sum[t][r] = sum[t][r] * rescale[r] + total;
      }
#pragma unroll
      for (auto& o : out[t]) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[c] *= rescale[c / 2];
      }
    }
  }

  /// Divides by the sums, whole only now, and leaves the log-sum-exps, in base 2, in `max`.
  __device__ void normalise(float scale) {
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[t][r];
        total += __shfl_xor_sync(~0U, total, 1);
        total += __shfl_xor_sync(~0U, total, 2);
        const float inverse = 1.0F / total;
        max[t][r] = fmaf(max[t][r], scale, log2f(total));
#pragma unroll
        for (auto& o : out[t]) {
          o[2 * r] *= inverse;
          o[2 * r + 1] *= inverse;
        }
      }
    }
  }
};

/// scores = Q K^T of a warp's rows.
template <class T>
__device__ void multiply_keys(uint32_t queries, uint32_t keys, int lane,
                              float (&scores)[T::kRowTiles][T::kKeys / 8][4]) {
#pragma unroll
  for (int k = 0; k < T::kColTiles; ++k) {
    uint32_t a[T::kRowTiles][4];
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t) {
      ldmatrix(a[t], queries + k / 4 * T::kQueryPanel +
                         swizzle(t * 16 + lane % 16, k % 4 * 2 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < T::kKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix(b, keys + k / 4 * T::kKeyPanel +
                      swizzle(n * 16 + lane % 8 + lane / 16 * 8, k % 4 * 2 + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < T::kRowTiles; ++t) {
        mma(scores[t][2 * n], a[t], b[0], b[1]);
        mma(scores[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

/// out += P V of a warp's rows.
template <class T>
__device__ void multiply_values(const float (&weights)[T::kRowTiles][T::kKeys / 8][4],
                                uint32_t values, int lane,
                                float (&out)[T::kRowTiles][T::kColTiles * 2][4]) {
#pragma unroll
  for (int k = 0; k < T::kKeys / 16; ++k) {
    uint32_t a[T::kRowTiles][4];
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t) {
      const auto& w = weights[t];
      a[t][0] = pack_bf16(w[2 * k][0], w[2 * k][1]);
      a[t][1] = pack_bf16(w[2 * k][2], w[2 * k][3]);
      a[t][2] = pack_bf16(w[2 * k + 1][0], w[2 * k + 1][1]);
      a[t][3] = pack_bf16(w[2 * k + 1][2], w[2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < T::kColTiles; ++n) {
      uint32_t b[4];
      ldmatrix_trans(
          b, values + n / 4 * T::kKeyPanel + swizzle(k * 16 + lane % 16, n % 4 * 2 + lane / 16));
#pragma unroll
      for (int t = 0; t < T::kRowTiles; ++t) {
        mma(out[t][2 * n], a[t], b[0], b[1]);
        mma(out[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

/// Writes a warp's rows, by way of the shared memory its queries stood in.
template <class T>
__device__ void write_rows(const AttentionArgs& args, const Softmax<T>& softmax, uint8_t* queries,
                           __nv_bfloat16* to, int num_rows, int lane) {
  __syncwarp();
#pragma unroll
  for (int t = 0; t < T::kRowTiles; ++t) {
#pragma unroll
    for (int n = 0; n < T::kColTiles * 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* o = softmax.out[t][n] + 2 * r;
        *reinterpret_cast<uint32_t*>(queries + n / 8 * T::kQueryPanel +
                                     swizzle(t * 16 + lane / 4 + 8 * r, n % 8) + lane % 4 * 4) =
            pack_bf16(o[0], o[1]);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < T::kRowTiles * 16 * T::kPanels * 8; i += 32) {
    const int row = i / (T::kPanels * 8);
    const int chunk = i % (T::kPanels * 8);
    if (row < num_rows && chunk * 8 < args.kv.head_dim) {
      *reinterpret_cast<uint4*>(to + row * args.out_stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(queries + chunk / 8 * T::kQueryPanel +
                                          swizzle(row, chunk % 8));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    prefill_kernel(const __grid_constant__ AttentionArgs args, const PrefillTile* tiles) {
  extern __shared__ __align__(1024) uint8_t smem[];
  __shared__ int keys_of_row[T::kRows];  // that it sees: no register has room for them
  const uint32_t queries = smem_address(smem);
  const uint32_t keys = queries + T::kPanels * T::kQueryPanel;
  const uint32_t values = keys + T::kPanels * T::kKeyPanel;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * (16 * T::kRowTiles);

  const PrefillTile tile = tiles[blockIdx.x];
  const SeqView seq = args.plan.seqs[tile.seq];
  const int num_rows = min(seq.num_rows - tile.row, T::kRows);
  const int first_position = static_cast<int>(seq.first_position) + tile.row;
  const ContextShard& context = args.plan.context;
  const int num_keys = context.keys(first_position + num_rows);
  for (int r = threadIdx.x; r < T::kRows; r += T::kThreads) {
    keys_of_row[r] = context.keys(first_position + r + 1);
  }
  const int kv_head = tile.head / (args.num_heads / args.kv.num_kv_heads);
  const int32_t* table = args.plan.block_tables + seq.table;
  const int64_t row = int64_t{seq.first_row} + tile.row;
  const int64_t col = int64_t{tile.head} * args.kv.head_dim;

  load_queries<T>(args, args.q + row * args.q_stride + col, num_rows, queries);
  load_keys<T>(args, table, kv_head, 0, 0, num_keys, keys);
  cp_async_commit();

  Softmax<T> softmax;
  for (int first = 0; first < num_keys; first += T::kKeys) {
    cp_async_wait<0>();
    __syncthreads();
    load_keys<T>(args, table, kv_head, args.kv.value.offset, first, num_keys, values);
    cp_async_commit();

    float scores[T::kRowTiles][T::kKeys / 8][4] = {};
    multiply_keys<T>(queries + warp_row * 128, keys, lane, scores);
    if (first + T::kKeys > keys_of_row[warp_row]) {
#pragma unroll
      for (int t = 0; t < T::kRowTiles; ++t) {
        const int upper = warp_row + t * 16 + lane / 4;
        const int sees[2] = {keys_of_row[upper], keys_of_row[upper + 8]};
#pragma unroll
        for (int n = 0; n < T::kKeys / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (first + n * 8 + lane % 4 * 2 + c % 2 >= sees[c / 2]) scores[t][n][c] = -INFINITY;
          }
        }
      }
    }

    cp_async_wait<0>();
    __syncthreads();
    if (first + T::kKeys < num_keys) {
      load_keys<T>(args, table, kv_head, 0, first + T::kKeys, num_keys, keys);
      cp_async_commit();
    }
    softmax.weigh(scores, seq.scale_log2);
    multiply_values<T>(scores, values, lane, softmax.out);
  }
  softmax.normalise(seq.scale_log2);
  if (args.log_sum_exp != nullptr && lane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2 * T::kRowTiles; ++i) {
      const int tile_row = warp_row + lane / 4 + 8 * i;
      if (tile_row < num_rows) {
        args.log_sum_exp[(row + tile_row) * args.log_sum_exp_stride + tile.head] =
            softmax.max[i / 2][i % 2] * kLn2;
      }
    }
  }
  write_rows<T>(args, softmax, smem + warp_row * 128,
                args.out + (row + warp_row) * args.out_stride + col, num_rows - warp_row, lane);
}

/// The kernel of a head size on the current device, told to `use` with the shape of its tile.
template <class Use>
cudaError_t with_kernel(int head_dim, Use use) {
  const auto with = [&](auto tile) { return use(prefill_kernel<decltype(tile)>, tile); };
  if (head_dim <= 64) return with(Tile<4, 64>());
  if (head_dim <= 80) return with(Tile<5, 64>());
  if (head_dim <= 96) return with(Tile<6, 64>());
  if (head_dim <= 128) return with(Tile<8, 64>());
  if (head_dim <= 192) return with(Tile<12, 64>());
  int device = 0;
  int smem = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  return smem >= Tile<16, 64>::kSmem ? with(Tile<16, 64>()) : with(Tile<16, 32>());
}

}  // namespace

cudaError_t prepare_prefill_mma(int32_t head_dim) {
  return with_kernel(head_dim, [](auto kernel, auto tile) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile.kSmem);
  });
}

cudaError_t attention_prefill_mma(const AttentionArgs& args, const PrefillTile* tiles,
                                  int32_t num_tiles, cudaStream_t stream) {
  if (num_tiles == 0) return cudaSuccess;
  return with_kernel(args.kv.head_dim, [&](auto kernel, auto tile) {
    kernel<<<num_tiles, tile.kThreads, tile.kSmem, stream>>>(args, tiles);
    return cudaGetLastError();
  });
}

}  // namespace longspan::cuda
