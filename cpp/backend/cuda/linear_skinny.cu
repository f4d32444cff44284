#include <cuda_bf16.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "backend/cuda/linear_skinny.h"
#include "backend/cuda/mma.cuh"
#include "backend/cuda/overlap.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 8;  // of a block; they share K
constexpr int kThreads = kWarps * 32;
constexpr int kTileN = 16;   // rows of weights of a block at a time: the M of an mma
constexpr int kTileM = 8;    // rows of x of an mma
constexpr int kSlice = 128;  // elements of K that a warp takes at a time
constexpr int kChunk = 32;   // elements of K that two mma.sync take: 8 a lane
constexpr int kChunks = kSlice / kChunk;
constexpr int kRowBytes = kSlice * 2;
/// Two rows of weights in a stage. The second begins 64 bytes late, so that the eight lanes whose
/// 16 bytes are read at once find them in different banks.
constexpr int kPairBytes = 2 * kRowBytes + 64;
constexpr int kStageBytes = kTileN / 2 * kPairBytes;
constexpr int kMaxStages = 4;
constexpr int kMinStages = 2;

/// Shared memory after the stages, which are [kWarps][stages][kStageBytes].
template <int kMTiles>
struct Fixed {
  uint64_t landed[kWarps][kMaxStages];
  float partial[kWarps][kTileN][kMTiles * kTileM + 1];
};

struct SkinnyArgs {
  const __nv_bfloat16* x;
  const __nv_bfloat16* weight;
  const float* bias;
  void* y;
  int64_t x_stride;
  int64_t weight_stride;
  int64_t y_stride;
  int32_t m;
  int32_t n;  // columns of y
  int32_t k;  // a multiple of 8
  int32_t stages;
};

/// y = x W^T + bias: the 16 rows of weights of a tile follow each other.
template <class Out>
struct Plain {
  using Element = Out;
  static constexpr int kCols = kTileN;  // of y

  __device__ static int weight_row(const SkinnyArgs&, int tile, int r) { return tile * kCols + r; }
  /// value(r): the finished product with row r of the tile.
  template <class Value>
  __device__ static float output(int col, const Value& value) {
    return value(col);
  }
};

/// y = silu(gate) * up: eight rows of weights of the gate, then the same of up, n rows later. Gate
/// and up are rounded to what a product on its own would leave.
struct Gated {
  using Element = __nv_bfloat16;
  static constexpr int kCols = kTileN / 2;

  __device__ static int weight_row(const SkinnyArgs& args, int tile, int r) {
    return tile * kCols + r % kCols + (r < kCols ? 0 : args.n);
  }
  template <class Value>
  __device__ static float output(int col, const Value& value) {
    const auto rounded = [](float v) { return __bfloat162float(__float2bfloat16_rn(v)); };
    const float gate = rounded(value(col));
    return gate / (1.0f + expf(-gate)) * rounded(value(col + kCols));
  }
};

/// Tiles of 16 outputs and slices of K in the order in which a warp takes them.
struct Place {
  int tile;
  int slice;
  __device__ void advance(int num_slices, int warp) {
    slice += kWarps;
    if (slice < num_slices) return;
    slice = warp;
    tile += static_cast<int>(gridDim.x);
  }
};

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

/// A block takes 16 rows of weights at a time for up to kMTiles x 8 rows of x, its warps sharing K.
/// Each warp has a ring of stages in shared memory to which slices of weights are on their way,
/// across the ends of tiles and before the kernel before has ended, since nobody writes weights.
/// They are the A operand of m16n8k16, x the B operand. Any order of K will do as long as both keep
/// it, so a lane takes 8 consecutive elements of a row, 16 bytes, for two products: elements 0 to 3
/// stand for the lane's columns 2t, 2t+1, 2t+8, 2t+9 of the first, 4 to 7 of the second.
template <int kMTiles, class Kind>
class Skinny {
 public:
  __device__ Skinny(const SkinnyArgs& args, uint8_t* smem)
      : args_(args),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        group_(lane_ / 4),
        quad_(lane_ % 4),
        num_tiles_((args.n + Kind::kCols - 1) / Kind::kCols),
        num_slices_((args.k + kSlice - 1) / kSlice),
        fixed_(*reinterpret_cast<Fixed<kMTiles>*>(smem + kWarps * args.stages * kStageBytes)),
        stages_(smem_address(smem) + warp_ * args.stages * kStageBytes),
        landed_(smem_address(fixed_.landed[warp_])),
        next_{warp_ < num_slices_ ? static_cast<int>(blockIdx.x) : num_tiles_, warp_} {
#if __CUDA_ARCH__ >= 900
    const uint32_t arrivals = 1;
#else
    const uint32_t arrivals = 32;
#endif
    if (lane_ < args.stages) mbarrier_init(landed_ + lane_ * 8, arrivals);
#if __CUDA_ARCH__ >= 900
    fence_async_proxy();
#endif
    __syncwarp();
  }

  __device__ void run() {
    for (int s = 0; s < args_.stages; ++s) load_weights(s);
    let_next_kernel_start();
    wait_for_previous_kernel();
    uint4 x[kChunks][kMTiles];
    load_rows(warp_, x);
    int stage = 0;
    uint32_t parity = 0;
    for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles_;
         tile += static_cast<int>(gridDim.x)) {
      float sums[kMTiles][4] = {};
      for (Place at{tile, warp_}; at.tile == tile && at.slice < num_slices_;) {
        const int slice = at.slice;
        at.advance(num_slices_, warp_);
        uint4 next_x[kChunks][kMTiles];
        load_rows(at.slice, next_x);
        mbarrier_wait(landed_ + stage * 8, parity);
        __syncwarp();
        multiply(slice, stages_ + stage * kStageBytes, x, sums);
        __syncwarp();
        load_weights(stage);
        if (++stage == args_.stages) {
          stage = 0;
          parity ^= 1;
        }
#pragma unroll
        for (int u = 0; u < kChunks; ++u) {
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) x[u][m] = next_x[u][m];
        }
      }
      __syncthreads();  // the tile before has been read
      store_partial(sums);
      __syncthreads();
      write(tile);
    }
  }

 private:
  /// Bytes from the beginning of a stage to row r of its weights.
  __device__ static uint32_t row_offset(int r) {
    return r / 2 * kPairBytes + r % 2 * (kRowBytes + 64);
  }

  /// Starts the copy of the warp's next slice to a stage that nobody reads any more.
  __device__ void load_weights(int stage) {
    if (next_.tile >= num_tiles_) return;
    const uint32_t to = stages_ + stage * kStageBytes;
    const uint32_t landed = landed_ + stage * 8;
    const int cols = min(Kind::kCols, args_.n - next_.tile * Kind::kCols);
    const int bytes = min(kSlice, args_.k - next_.slice * kSlice) * 2;
    const __nv_bfloat16* from = args_.weight + next_.slice * kSlice;
    const auto row_at = [&](int r) {
      return from + Kind::weight_row(args_, next_.tile, r) * args_.weight_stride;
    };
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) mbarrier_arrive_expect(landed, kTileN / Kind::kCols * cols * bytes);
    __syncwarp();
    if (lane_ < kTileN && lane_ % Kind::kCols < cols) {
      bulk_copy_once(to + row_offset(lane_), row_at(lane_), bytes, landed);
    }
#else
    constexpr int kRowChunks = kRowBytes / 16;
    for (int i = lane_; i < kTileN * kRowChunks; i += 32) {
      const int row = i / kRowChunks;
      const int chunk = i % kRowChunks;
      if (row % Kind::kCols >= cols || chunk * 16 >= bytes) continue;
      cp_async(to + row_offset(row) + chunk * 16, row_at(row) + chunk * 8);
    }
    cp_async_arrive(landed);
#endif
    next_.advance(num_slices_, warp_);
  }

  /// The lane's share of a slice of x; zeros beyond its rows and columns.
  __device__ void load_rows(int slice, uint4 (&x)[kChunks][kMTiles]) const {
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
      const int row = t * kTileM + group_;
      const int first = slice * kSlice + quad_ * 8;
      const __nv_bfloat16* from = args_.x + row * args_.x_stride + first;
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        const bool inside = row < args_.m && first + u * kChunk < args_.k;
        x[u][t] = inside ? *reinterpret_cast<const uint4*>(from + u * kChunk) : uint4{};
      }
    }
  }

  __device__ void multiply(int slice, uint32_t weights, const uint4 (&x)[kChunks][kMTiles],
                           float (&sums)[kMTiles][4]) const {
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      const uint32_t column = u * kChunk * 2 + quad_ * 16;
      uint4 top = load_shared(weights + row_offset(group_) + column);
      uint4 bottom = load_shared(weights + row_offset(group_ + 8) + column);
      // Beyond K a stage holds what was there before, of which not even 0 times it need be 0.
      if (slice * kSlice + u * kChunk + quad_ * 8 >= args_.k) top = bottom = uint4{};
      const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
      const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        mma(sums[m], first, x[u][m].x, x[u][m].y);
        mma(sums[m], second, x[u][m].z, x[u][m].w);
      }
    }
  }

  __device__ void store_partial(const float (&sums)[kMTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fixed_.partial[warp_][i / 2 * 8 + group_][m * kTileM + quad_ * 2 + i % 2] = sums[m][i];
      }
    }
  }

  /// Adds the warps' sums in order.
  __device__ void write(int tile) const {
    auto* y = static_cast<typename Kind::Element*>(args_.y);
    for (int i = static_cast<int>(threadIdx.x); i < Kind::kCols * args_.m; i += kThreads) {
      const int col = i % Kind::kCols;
      const int row = i / Kind::kCols;
      const int n = tile * Kind::kCols + col;
      if (n >= args_.n) continue;
      const auto value = [&](int r) {
        float sum = args_.bias == nullptr ? 0.0f : args_.bias[Kind::weight_row(args_, tile, r)];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += fixed_.partial[w][r][row];
        return sum;
      };
      y[row * args_.y_stride + n] = static_cast<typename Kind::Element>(Kind::output(col, value));
    }
  }

  const SkinnyArgs& args_;
  const int warp_;
  const int lane_;
  const int group_;  // of the fragments: row of A, column of B
  const int quad_;
  const int num_tiles_;
  const int num_slices_;
  Fixed<kMTiles>& fixed_;
  const uint32_t stages_;  // of this warp
  const uint32_t landed_;
  Place next_;  // what is copied next
};

template <int kMTiles, class Kind>
__global__ void __launch_bounds__(kThreads, 2)
    skinny_kernel(const __grid_constant__ SkinnyArgs args) {
  extern __shared__ __align__(128) uint8_t smem[];
  Skinny<kMTiles, Kind>(args, smem).run();
}

/// How a kernel is launched on a device: two blocks to a multiprocessor, or one where two leave no
/// room for enough stages.
struct Launch {
  int resident = 0;  // blocks that the device holds at once
  int stages = 0;
  int smem_bytes = 0;

  Launch(int device, const void* kernel, int fixed_bytes) {
    int sms = 0;
    int sm_bytes = 0;
    int block_bytes = 0;
    int reserved = 0;
    for (const auto& [to, attribute] :
         {std::pair{&sms, cudaDevAttrMultiProcessorCount},
          std::pair{&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
          std::pair{&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
          std::pair{&reserved, cudaDevAttrReservedSharedMemoryPerBlock}}) {
      cudaDeviceGetAttribute(to, attribute, device);
    }
    const auto stages_of = [&](int blocks) {
      const int bytes = std::min(sm_bytes / blocks - reserved, block_bytes) - fixed_bytes;
      return std::min(bytes / (kWarps * kStageBytes), kMaxStages);
    };
    const int blocks = stages_of(2) >= kMinStages ? 2 : 1;
    resident = sms * blocks;
    stages = stages_of(blocks);
    smem_bytes = stages * kWarps * kStageBytes + fixed_bytes;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  }
};

/// On the current device, which is asked and told once.
template <int kMTiles, class Kind>
const Launch& launch_here() {
  static std::mutex mutex;
  static std::map<int, const Launch> known;  // by device; guarded by mutex
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  const auto kernel = reinterpret_cast<const void*>(skinny_kernel<kMTiles, Kind>);
  return known.try_emplace(device, device, kernel, static_cast<int>(sizeof(Fixed<kMTiles>)))
      .first->second;
}

template <int kMTiles, class Kind>
void launch(SkinnyArgs args, cudaStream_t stream) {
  const Launch& how = launch_here<kMTiles, Kind>();
  args.stages = how.stages;
  // As many blocks as the device holds at once go round all tiles: none waits for another's end.
  const int tiles = (args.n + Kind::kCols - 1) / Kind::kCols;
  const int rounds = (tiles + how.resident - 1) / how.resident;
  const int blocks = (tiles + rounds - 1) / rounds;  // with the same number of tiles each
  launch_overlapped(skinny_kernel<kMTiles, Kind>, static_cast<unsigned>(blocks), kThreads,
                    static_cast<size_t>(how.smem_bytes), stream, args);
}

template <class Kind>
void launch(const MatrixView& x, const void* weight, int64_t weight_stride, const float* bias,
            const MatrixView& y, cudaStream_t stream) {
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
  x.rows <= kTileM ? launch<1, Kind>(args, stream) : launch<2, Kind>(args, stream);
}

}  // namespace

void linear_skinny(const MatrixView& x, const void* weight, int64_t weight_stride,
                   const float* bias, const MatrixView& y, cudaStream_t stream) {
  const auto run = y.dtype == DType::kF32 ? launch<Plain<float>> : launch<Plain<__nv_bfloat16>>;
  run(x, weight, weight_stride, bias, y, stream);
}

void linear_silu_mul_skinny(const MatrixView& x, const void* weight, int64_t weight_stride,
                            const float* bias, const MatrixView& y, cudaStream_t stream) {
  launch<Gated>(x, weight, weight_stride, bias, y, stream);
}

}  // namespace longspan::cuda
