#include <cuda_bf16.h>

#include "backend/cuda/linear_skinny.h"
#include "backend/cuda/mma.cuh"
#include "backend/cuda/overlap.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 8;   // of a block; they share K
constexpr int kUnroll = 4;  // chunks under way at once: 64 bytes a lane and tile
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

/// A block computes kNTiles x 16 outputs for up to kMTiles x 8 rows. The weights are the A operand
/// of m16n8k16, x the B operand. Any order of K will do as long as both keep it, so a lane loads 8
/// consecutive elements of a row, 16 bytes, and gives them to two products: elements 0 to 3 stand
/// for the lane's columns 2t, 2t+1, 2t+8, 2t+9 of the first, 4 to 7 of the second.
template <int kNTiles, int kMTiles, class Out>
__global__ void __launch_bounds__(kWarps * 32) skinny_kernel(SkinnyArgs args) {
  __shared__ float partial[kWarps][kNTiles * kTileN][kMTiles * kTileM + 1];
  const int warp = threadIdx.x / 32;
  const int group = threadIdx.x % 32 / 4;
  const int quad = threadIdx.x % 4;
  const int first_n = blockIdx.x * kNTiles * kTileN;

  float sums[kNTiles][kMTiles][4] = {};
  const __nv_bfloat16* weights[kNTiles][2];
  bool has_weight[kNTiles][2];
#pragma unroll
  for (int tile = 0; tile < kNTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_n + tile * kTileN + half * 8 + group;
      has_weight[tile][half] = row < args.n;
      weights[tile][half] = args.weight + (row < args.n ? row : 0) * args.weight_stride;
    }
  }
  const __nv_bfloat16* rows[kMTiles];
  bool has_row[kMTiles];
#pragma unroll
  for (int tile = 0; tile < kMTiles; ++tile) {
    const int row = tile * kTileM + group;
    has_row[tile] = row < args.m;
    rows[tile] = args.x + (row < args.m ? row : 0) * args.x_stride;
  }

  constexpr int kStep = kChunk * kUnroll;
  const uint4 zero = {0, 0, 0, 0};
  uint4 next[kUnroll][kNTiles]
            [2];  // weights of the step to come, under way while one is multiplied
  const auto load_weights = [&](int64_t base) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k = base + u * kChunk + quad * 8;
#pragma unroll
      for (int tile = 0; tile < kNTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          next[u][tile][half] =
              k < args.k && has_weight[tile][half] ? load_once(weights[tile][half] + k) : zero;
        }
      }
    }
  };
  let_next_kernel_start();
  load_weights(warp * kStep);  // nobody writes them, so they need not wait
  wait_for_previous_kernel();
  for (int64_t base = warp * kStep; base < args.k; base += kWarps * kStep) {
    uint4 a[kUnroll][kNTiles][2];
    uint4 b[kUnroll][kMTiles];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k = base + u * kChunk + quad * 8;
#pragma unroll
      for (int tile = 0; tile < kMTiles; ++tile) {
        b[u][tile] =
            k < args.k && has_row[tile] ? *reinterpret_cast<const uint4*>(rows[tile] + k) : zero;
      }
#pragma unroll
      for (int tile = 0; tile < kNTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) a[u][tile][half] = next[u][tile][half];
      }
    }
    load_weights(base + kWarps * kStep);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int tile = 0; tile < kNTiles; ++tile) {
        const uint4& top = a[u][tile][0];
        const uint4& bottom = a[u][tile][1];
        const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
        const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          mma(sums[tile][m], first, b[u][m].x, b[u][m].y);
          mma(sums[tile][m], second, b[u][m].z, b[u][m].w);
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kNTiles; ++tile) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial[warp][tile * kTileN + i / 2 * 8 + group][m * kTileM + quad * 2 + i % 2] =
            sums[tile][m][i];
      }
    }
  }
  __syncthreads();
  auto* y = static_cast<Out*>(args.y);
  for (int i = threadIdx.x; i < kNTiles * kTileN * args.m; i += blockDim.x) {
    const int col = i % (kNTiles * kTileN);
    const int row = i / (kNTiles * kTileN);
    const int n = first_n + col;
    if (n >= args.n) continue;
    float sum = args.bias == nullptr ? 0.0f : args.bias[n];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][col][row];
    y[row * args.y_stride + n] = static_cast<Out>(sum);
  }
}

template <int kNTiles, int kMTiles>
void launch(const SkinnyArgs& args, DType out, cudaStream_t stream) {
  const int cols = kNTiles * kTileN;
  const auto blocks = static_cast<unsigned>((args.n + cols - 1) / cols);
  if (out == DType::kF32) {
    launch_overlapped(skinny_kernel<kNTiles, kMTiles, float>, blocks, kWarps * 32, 0, stream, args);
  } else {
    launch_overlapped(skinny_kernel<kNTiles, kMTiles, __nv_bfloat16>, blocks, kWarps * 32, 0,
                      stream, args);
  }
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
