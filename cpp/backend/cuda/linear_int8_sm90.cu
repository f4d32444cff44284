#include <algorithm>

#include "backend/cuda/linear_int8_sm90.h"
#include "backend/cuda/prefill_sm90.cuh"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

constexpr int kRows =
    128;  // of x, of a thread block; the blocks of a cluster take one after another
constexpr int kConsumers = kRows / 64;
constexpr int kThreads = kWarpgroup * (kConsumers + 1);
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
/// Tiles of a cluster down the rows that are taken before the next columns: about as many rows as
/// columns are under way at once, so that L2 has both.
constexpr int kGroupTiles = 8;

struct ProductArgs {
  Int8Matrix x;
  Int8Matrix weight;
  const float* bias;
  __nv_bfloat16* y;
  int64_t y_stride;
  bool has_whole_eights;  // of y
};

/// Shared memory: a ring of slots with a slice of a thread block's rows of x and of the cluster's
/// kCols rows of weights. What is beyond the last row of either is whatever was there: it makes
/// sums that nobody writes.
template <int kCols>
struct Shared {
  static constexpr int kSlots = kCols == 256 ? 4 : 8;
  alignas(1024) char x[kSlots][kRows * kInt8Slice];
  alignas(1024) char weight[kSlots][kCols * kInt8Slice];
  uint64_t full[kSlots];
  uint64_t empty[kSlots];
};
static_assert(std::max(sizeof(Shared<256>), sizeof(Shared<64>)) <= 227 * 1024);

/// Of a cluster.
struct ProductTile {
  int64_t row;
  int64_t col;
};

template <int kCols>
struct Tiles {
  int rows;  // in tiles
  int cols;

  __host__ __device__ Tiles(int64_t m, int64_t n)
      : rows(static_cast<int>((m + kCluster * kRows - 1) / (kCluster * kRows))),
        cols(static_cast<int>((n + kCols - 1) / kCols)) {}
  __host__ __device__ int count() const { return rows * cols; }
  __device__ ProductTile operator[](int t) const {
    const int group = t / (kGroupTiles * cols);
    const int size = min(kGroupTiles, rows - group * kGroupTiles);
    const int within = t - group * kGroupTiles * cols;
    return {int64_t{group * kGroupTiles + within % size} * (kCluster * kRows),
            int64_t{within / size} * kCols};
  }
};

/// The rows of a matrix from `first` on that a tile of `most` has.
__device__ inline int rows_there(const Int8Matrix& m, int64_t first, int most) {
  return static_cast<int>(max(int64_t{0}, min(int64_t{most}, m.rows - first)));
}

/// By one thread: a thread block's own rows of x, and its half of the weights to both.
template <int kCols>
__device__ void bring(const ProductArgs& args, Shared<kCols>& shared, int rank) {
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  constexpr int kShare = kCols / kCluster;
  const Tiles<kCols> tiles(args.x.rows, args.weight.rows);
  const auto slices = static_cast<int>(args.x.cols / kInt8Slice);
  Turn<Shared<kCols>::kSlots> turn;
  for (int t = blockIdx.x / kCluster; t < tiles.count(); t += gridDim.x / kCluster) {
    const ProductTile tile = tiles[t];
    const int64_t row = tile.row + rank * kRows;
    const int64_t col = tile.col + rank * kShare;
    const uint32_t x_bytes = rows_there(args.x, row, kRows) * kInt8Slice;
    const uint32_t weight_bytes = rows_there(args.weight, col, kShare) * kInt8Slice;
    const uint32_t all_bytes = x_bytes + rows_there(args.weight, tile.col, kCols) * kInt8Slice;
    const int8_t* x = args.x.codes + row * kInt8Slice;
    const int8_t* weight = args.weight.codes + col * kInt8Slice;
    for (int slice = 0; slice < slices; ++slice) {
      mbarrier_wait_amid(smem_address(&shared.empty[turn.slot]), turn.parity ^ 1);
      const uint32_t full = smem_address(&shared.full[turn.slot]);
      mbarrier_arrive_expect(full, all_bytes);
      if (x_bytes > 0) {
        bulk_copy_multicast(smem_address(shared.x[turn.slot]), x, x_bytes, full,
                            static_cast<uint16_t>(1 << rank));
      }
      if (weight_bytes > 0) {
        bulk_copy_multicast(smem_address(shared.weight[turn.slot]) + rank * kShare * kInt8Slice,
                            weight, weight_bytes, full, kAll);
      }
      x += args.x.rows * kInt8Slice;
      weight += args.weight.rows * kInt8Slice;
      turn.next();
    }
  }
}

/// Of four lanes, lane q gives word[i] to lane i as its word[q].
__device__ inline void transpose(int quad, uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool high = (quad & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t other = __shfl_xor_sync(0xffffffff, high ? word[i] : word[i + step], step);
      word[i] = high ? other : word[i];
      word[i + step] = high ? word[i + step] : other;
    }
  }
}

/// Two numbers at a multiple of 8 bytes, of which `count` are there.
__device__ inline float2 two_of(const float* from, int count) {
  if (count >= 2) return *reinterpret_cast<const float2*>(from);
  return {count == 1 ? *from : 0.0f, 0.0f};
}

/// Writes eight columns of y, of which `count` are there.
__device__ inline void write8(const ProductArgs& args, __nv_bfloat16* to, int count,
                              const uint32_t (&words)[4]) {
  if (args.has_whole_eights && count >= 8) {
    *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= count) return;
    to[i] = __ushort_as_bfloat16(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
  }
}

/// Writes a consumer's 64 rows from `row` on.
template <int kCols>
__device__ void write(const ProductArgs& args, int64_t row, int64_t first_col,
                      const int32_t (&sums)[kCols / 2]) {
  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
  const auto cols = static_cast<int>(min(int64_t{kCols}, args.weight.rows - first_col));
  row += threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  const bool inside[2] = {row < args.x.rows, row + 8 < args.x.rows};
  const float x_scale[2] = {inside[0] ? args.x.scales[row] : 0.0f,
                            inside[1] ? args.x.scales[row + 8] : 0.0f};
  const float* weight_scales = args.weight.scales + first_col + quad * 2;
  const float* biases = args.bias + first_col + quad * 2;
  __nv_bfloat16* to = args.y + row * args.y_stride + first_col + quad * 8;
#pragma unroll
  for (int j = 0; j < kCols / 8; j += 4) {
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int col = (j + i) * 8;
      const float2 scale = two_of(weight_scales + col, cols - quad * 2 - col);
      float2 bias{};
      if (args.bias != nullptr) bias = two_of(biases + col, cols - quad * 2 - col);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int32_t* sum = sums + 4 * (j + i) + 2 * h;
        words[h][i] = pack_bf16(fmaf(static_cast<float>(sum[0]), x_scale[h] * scale.x, bias.x),
                                fmaf(static_cast<float>(sum[1]), x_scale[h] * scale.y, bias.y));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      transpose(quad, words[h]);
      if (inside[h]) {
        write8(args, to + h * 8 * args.y_stride + j * 8, cols - (j + quad) * 8, words[h]);
      }
    }
  }
}

template <int kCols>
__device__ void compute(const ProductArgs& args, Shared<kCols>& shared, int rank, int consumer) {
  const int lane = threadIdx.x % 32;
  const Tiles<kCols> tiles(args.x.rows, args.weight.rows);
  const auto slices = static_cast<int>(args.x.cols / kInt8Slice);
  const uint32_t empty = cluster_address(smem_address(shared.empty), lane % kCluster);
  const auto release = [&](int slot) {
    if (lane < kCluster) mbarrier_arrive_cluster(empty + slot * sizeof(uint64_t));
  };
  Turn<Shared<kCols>::kSlots> turn;
  for (int t = blockIdx.x / kCluster; t < tiles.count(); t += gridDim.x / kCluster) {
    int32_t sums[kCols / 2] = {};
    int held = 0;  // the slot of the slice before
    for (int slice = 0; slice < slices; ++slice) {
      mbarrier_wait_amid(smem_address(&shared.full[turn.slot]), turn.parity);
      const int slot = turn.next();
      const uint64_t x = wgmma_operand(smem_address(shared.x[slot]) + consumer * 64 * kInt8Slice);
      const uint64_t weight = wgmma_operand(smem_address(shared.weight[slot]));
      pin(sums);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kInt8Slice; k += 32) {
        wgmma_int8(sums, wgmma_advance(x, k), wgmma_advance(weight, k));
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (slice > 0) release(held);
      held = slot;
    }
    wgmma_wait<0>();
    pin(sums);
    release(held);
    const ProductTile tile = tiles[t];
    write<kCols>(args, tile.row + rank * kRows + consumer * 64, tile.col, sums);
  }
}

template <int kCols>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ ProductArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // empty in code for other cards
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Shared<kCols>*>(memory);
  const auto rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    init_ring(shared.full, shared.empty, kConsumers);
    fence_mbarrier_init();
  }
  const auto produce = [&](int) {
    if (threadIdx.x == 0) bring(args, shared, rank);
    __syncwarp();
  };
  take_roles<kProducerRegisters, kConsumerRegisters>(
      produce, [&](int consumer) { compute(args, shared, rank, consumer); });
#endif
}

template <int kCols>
cudaError_t launch(const ProductArgs& args, int max_clusters, cudaStream_t stream) {
  const int tiles = Tiles<kCols>(args.x.rows, args.weight.rows).count();
  return launch_clusters(product_kernel<kCols>, std::min(tiles, max_clusters), kThreads,
                         sizeof(Shared<kCols>), stream, args);
}

template <int kCols>
cudaError_t prepare() {
  return cudaFuncSetAttribute(product_kernel<kCols>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(sizeof(Shared<kCols>)));
}

}  // namespace

cudaError_t prepare_linear_int8_sm90() {
  const cudaError_t status = prepare<64>();
  return status == cudaSuccess ? prepare<256>() : status;
}

cudaError_t linear_int8_sm90(const Int8Matrix& x, const Int8Matrix& weight, const float* bias,
                             const MatrixView& y, int num_sms, cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  const ProductArgs args{x, weight, bias, y.row<__nv_bfloat16>(0), y.stride, has_whole_eights(y)};
  const int clusters = std::max(1, num_sms / kCluster);
  // Where tiles of 256 columns leave clusters idle, those of 64.
  const bool wide = Tiles<256>(x.rows, weight.rows).count() >= clusters;
  return wide ? launch<256>(args, clusters, stream) : launch<64>(args, clusters, stream);
}

}  // namespace longspan::cuda
