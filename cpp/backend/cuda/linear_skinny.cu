#include <cuda_bf16.h>

#include "backend/cuda/linear_skinny.h"
#include "backend/cuda/mma.cuh"
#include "backend/cuda/overlap.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 8;   // of a block; they share K
constexpr int kUnroll = 4;  // chunks of a step: 64 bytes a lane and row
constexpr int kChunk = 32;  // elements of K that an mma.sync pair takes: 8 a lane
constexpr int kTileN = 16;  // outputs of an mma
constexpr int kTileM = 8;   // rows of x of an mma

/// 16 bytes that nobody reads again.
__device__ inline uint4 load_once(const __nv_bfloat16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/// Blocks of a kernel that the current device holds at once.
int resident_blocks(const void* kernel, int threads) {
  int device = 0;
  int sms = 0;
  int per_sm = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0);
  return sms * (per_sm > 0 ? per_sm : 1);
}

struct SkinnyArgs {
  const __nv_bfloat16* x;
  const __nv_bfloat16* weight;
  const float* bias;
  void* y;
  int64_t x_stride;
  int64_t weight_stride;
  int64_t y_stride;
  int32_t m;
  int32_t n;
  int32_t k;  // a multiple of 8
};

/// A block computes kNTiles x 16 outputs at a time for up to kMTiles x 8 rows, its warps sharing K.
/// The weights are the A operand of m16n8k16, x the B operand. Any order of K will do as long as
/// both keep it, so a lane loads 8 consecutive elements of a row, 16 bytes, and gives them to two
/// products: elements 0 to 3 stand for the lane's columns 2t, 2t+1, 2t+8, 2t+9 of the first, 4 to 7
/// of the second. While a step is multiplied the next is under way, across the ends of tiles too.
template <int kNTiles, int kMTiles>
class Skinny {
 public:
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTileCols = kNTiles * kTileN;

  __device__ explicit Skinny(const SkinnyArgs& args)
      : args_(args),
        warp_(static_cast<int>(threadIdx.x / 32)),
        group_(static_cast<int>(threadIdx.x % 32 / 4)),
        quad_(static_cast<int>(threadIdx.x % 4)) {}

  template <class Out>
  __device__ void run() {
    __shared__ float partial[kWarps][kTileCols][kMTiles * kTileM + 1];
    const int num_tiles = (args_.n + kTileCols - 1) / kTileCols;
    const int steps = (args_.k + kWarps * kStep - 1) / (kWarps * kStep);
    let_next_kernel_start();
    load_weights(static_cast<int>(blockIdx.x), 0);  // nobody writes them: no need to wait
    wait_for_previous_kernel();
    load_rows(0);
    for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles;
         tile += static_cast<int>(gridDim.x)) {
      float sums[kNTiles][kMTiles][4] = {};
      for (int step = 0; step < steps; ++step) {
        uint4 a[kUnroll][kNTiles][2];
        uint4 b[kUnroll][kMTiles];
        take(a, b);
        const bool last = step + 1 == steps;
        const int next_tile = last ? tile + static_cast<int>(gridDim.x) : tile;
        if (next_tile < num_tiles) {
          load_weights(next_tile, last ? 0 : step + 1);
          load_rows(last ? 0 : step + 1);
        }
        multiply(a, b, sums);
      }
      __syncthreads();  // the tile before has been read
      store_partial(sums, partial[warp_]);
      __syncthreads();
      write<Out>(tile, partial);
    }
  }

 private:
  static constexpr int kStep = kChunk * kUnroll;

  __device__ int64_t first_k(int step) const {
    return int64_t{step * kWarps + warp_} * kStep + quad_ * 8;
  }

  __device__ void load_weights(int tile, int step) {
#pragma unroll
    for (int t = 0; t < kNTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kTileCols + t * kTileN + half * 8 + group_;
        const __nv_bfloat16* from = args_.weight + row * args_.weight_stride + first_k(step);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const bool inside = row < args_.n && first_k(step) + u * kChunk < args_.k;
          weights_[u][t][half] = inside ? load_once(from + u * kChunk) : uint4{};
        }
      }
    }
  }

  __device__ void load_rows(int step) {
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
      const int row = t * kTileM + group_;
      const __nv_bfloat16* from = args_.x + row * args_.x_stride + first_k(step);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool inside = row < args_.m && first_k(step) + u * kChunk < args_.k;
        rows_[u][t] = inside ? *reinterpret_cast<const uint4*>(from + u * kChunk) : uint4{};
      }
    }
  }

  __device__ void take(uint4 (&a)[kUnroll][kNTiles][2], uint4 (&b)[kUnroll][kMTiles]) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int t = 0; t < kNTiles; ++t) {
        a[u][t][0] = weights_[u][t][0];
        a[u][t][1] = weights_[u][t][1];
      }
#pragma unroll
      for (int t = 0; t < kMTiles; ++t) b[u][t] = rows_[u][t];
    }
  }

  __device__ static void multiply(const uint4 (&a)[kUnroll][kNTiles][2],
                                  const uint4 (&b)[kUnroll][kMTiles],
                                  float (&sums)[kNTiles][kMTiles][4]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int t = 0; t < kNTiles; ++t) {
        const uint4& top = a[u][t][0];
        const uint4& bottom = a[u][t][1];
        const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
        const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          mma(sums[t][m], first, b[u][m].x, b[u][m].y);
          mma(sums[t][m], second, b[u][m].z, b[u][m].w);
        }
      }
    }
  }

  __device__ void store_partial(const float (&sums)[kNTiles][kMTiles][4],
                                float (&partial)[kTileCols][kMTiles * kTileM + 1]) const {
#pragma unroll
    for (int t = 0; t < kNTiles; ++t) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          partial[t * kTileN + i / 2 * 8 + group_][m * kTileM + quad_ * 2 + i % 2] = sums[t][m][i];
        }
      }
    }
  }

  /// Adds the warps' sums in order.
  template <class Out>
  __device__ void write(int tile,
                        const float (&partial)[kWarps][kTileCols][kMTiles * kTileM + 1]) const {
    auto* y = static_cast<Out*>(args_.y);
    for (int i = static_cast<int>(threadIdx.x); i < kTileCols * args_.m; i += kThreads) {
      const int col = i % kTileCols;
      const int row = i / kTileCols;
      const int n = tile * kTileCols + col;
      if (n >= args_.n) continue;
      float sum = args_.bias == nullptr ? 0.0f : args_.bias[n];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][col][row];
      y[row * args_.y_stride + n] = static_cast<Out>(sum);
    }
  }

  const SkinnyArgs& args_;
  const int warp_;
  const int group_;  // of the fragments: row of A, column of B
  const int quad_;
  uint4 weights_[kUnroll][kNTiles][2];
  uint4 rows_[kUnroll][kMTiles];
};

template <int kNTiles, int kMTiles, class Out>
__global__ void __launch_bounds__(kWarps * 32)
    skinny_kernel(const __grid_constant__ SkinnyArgs args) {
  Skinny<kNTiles, kMTiles>(args).template run<Out>();
}

template <int kNTiles, int kMTiles, class Out>
void launch_as(const SkinnyArgs& args, cudaStream_t stream) {
  // As many blocks as the device holds at once go round all tiles: none waits for another's end.
  static const int resident = resident_blocks(
      reinterpret_cast<const void*>(skinny_kernel<kNTiles, kMTiles, Out>), kWarps * 32);
  constexpr int kCols = kNTiles * kTileN;
  const int tiles = (args.n + kCols - 1) / kCols;
  const int rounds = (tiles + resident - 1) / resident;
  const int blocks = (tiles + rounds - 1) / rounds;  // with the same number of tiles each
  launch_overlapped(skinny_kernel<kNTiles, kMTiles, Out>, static_cast<unsigned>(blocks),
                    kWarps * 32, 0, stream, args);
}

template <int kNTiles, int kMTiles>
void launch(const SkinnyArgs& args, DType out, cudaStream_t stream) {
  out == DType::kF32 ? launch_as<kNTiles, kMTiles, float>(args, stream)
                     : launch_as<kNTiles, kMTiles, __nv_bfloat16>(args, stream);
}

}  // namespace

void linear_skinny(const MatrixView& x, const void* weight, int64_t weight_stride,
                   const float* bias, const MatrixView& y, cudaStream_t stream) {
  SkinnyArgs args;
  args.x = static_cast<const __nv_bfloat16*>(x.data);
  args.weight = static_cast<const __nv_bfloat16*>(weight);
  args.bias = bias;
  args.y = y.data;
  args.x_stride = x.stride;
  args.weight_stride = weight_stride;
  args.y_stride = y.stride;
  args.m = static_cast<int32_t>(x.rows);
  args.n = static_cast<int32_t>(y.cols);
  args.k = static_cast<int32_t>(x.cols);
  // Two tiles share a load of x where there are outputs enough to fill the card all the same.
  const bool wide = y.cols >= 8192;
  if (x.rows <= kTileM) {
    wide ? launch<2, 1>(args, y.dtype, stream) : launch<1, 1>(args, y.dtype, stream);
  } else {
    wide ? launch<2, 2>(args, y.dtype, stream) : launch<1, 2>(args, y.dtype, stream);
  }
}

}  // namespace longspan::cuda
