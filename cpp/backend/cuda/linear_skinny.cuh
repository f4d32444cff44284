#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "backend/cuda/mma.cuh"
#include "backend/cuda/overlap.cuh"
#include "core/matrix.h"

/// Products of few rows, whatever weights and rows are in. A Format says that:
///   Operands: where they are; Sum: what products are added up in;
///   slices(): of kRowBytes of a row of weights, of which the last may be cut short;
///   kStageBytes: of a slice of a tile's rows of weights in shared memory;
///   load_weights(): starts the copy of a slice of a tile to a stage;
///   load_x(): the lane's share of a chunk of a slice of a row of x, zeros beyond K;
///   Reader: reads the lane's share of a chunk of two rows of weights from a stage;
///   value(): a finished product from its sum.
namespace longspan::cuda {

constexpr int kWarps = 8;  // of a block; they share K
constexpr int kThreads = kWarps * 32;
constexpr int kTileN = 16;       // rows of weights of a block at a time: the M of an mma
constexpr int kTileM = 8;        // rows of x of an mma
constexpr int kRowBytes = 256;   // of a row of weights that a warp takes at a time
constexpr int kChunkBytes = 64;  // that two mma.sync take: 16 a lane
constexpr int kChunks = kRowBytes / kChunkBytes;
constexpr int kMaxStages = 4;
constexpr int kMinStages = 2;

/// Shared memory after the stages, which are [kWarps][stages][Format::kStageBytes].
template <int kMTiles, class Sum>
struct Fixed {
  uint64_t landed[kWarps][kMaxStages];
  Sum partial[kWarps][kTileN][kMTiles * kTileM + 1];
};

/// Where the results go.
struct SkinnyOutput {
  const float* bias;
  void* y;
  int64_t stride;
  int32_t rows;
  int32_t cols;
};

template <class Format>
struct SkinnyArgs {
  typename Format::Operands in;
  SkinnyOutput out;
  int32_t stages;
};

/// y = x W^T + bias: the 16 rows of weights of a tile follow each other.
template <class Out>
struct Plain {
  using Element = Out;
  static constexpr int kCols = kTileN;  // of y

  __device__ static int weight_row(const SkinnyOutput&, int tile, int r) {
    return tile * kCols + r;
  }
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

  __device__ static int weight_row(const SkinnyOutput& out, int tile, int r) {
    return tile * kCols + r % kCols + (r < kCols ? 0 : out.cols);
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
/// They are the A operand of an mma, x the B operand. Any order of K will do as long as both keep
/// it, so a lane takes 16 consecutive bytes of a row for two products: the first four words of them
/// stand for the lane's columns of the first, the others for those of the second.
template <int kMTiles, class Kind, class Format>
class Skinny {
  using Sum = typename Format::Sum;

 public:
  __device__ Skinny(const SkinnyArgs<Format>& args, uint8_t* smem)
      : in_(args.in),
        out_(args.out),
        num_stages_(args.stages),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        group_(lane_ / 4),
        quad_(lane_ % 4),
        num_tiles_((out_.cols + Kind::kCols - 1) / Kind::kCols),
        num_slices_(Format::slices(in_)),
        reader_(Kind::weight_row(out_, 0, group_), Kind::weight_row(out_, 0, group_ + 8), group_,
                quad_),
        fixed_(*reinterpret_cast<Fixed<kMTiles, Sum>*>(smem +
                                                       kWarps * num_stages_ * Format::kStageBytes)),
        stages_(smem_address(smem) + warp_ * num_stages_ * Format::kStageBytes),
        landed_(smem_address(fixed_.landed[warp_])),
        next_{warp_ < num_slices_ ? static_cast<int>(blockIdx.x) : num_tiles_, warp_} {
    init_landed(landed_, num_stages_, lane_);
  }

  __device__ void run() {
    for (int s = 0; s < num_stages_; ++s) load_weights(s);
    let_next_kernel_start();
    wait_for_previous_kernel();
    uint4 x[kChunks][kMTiles];
    load_rows(warp_, x);
    int stage = 0;
    uint32_t parity = 0;
    for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles_;
         tile += static_cast<int>(gridDim.x)) {
      Sum sums[kMTiles][4] = {};
      for (Place at{tile, warp_}; at.tile == tile && at.slice < num_slices_;) {
        const int slice = at.slice;
        at.advance(num_slices_, warp_);
        uint4 next_x[kChunks][kMTiles];
        load_rows(at.slice, next_x);
        mbarrier_wait(landed_ + stage * 8, parity);
        __syncwarp();
        multiply(slice, stages_ + stage * Format::kStageBytes, x, sums);
        __syncwarp();
        load_weights(stage);
        if (++stage == num_stages_) {
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
  /// Starts the copy of the warp's next slice to a stage that nobody reads any more.
  __device__ void load_weights(int stage) {
    if (next_.tile >= num_tiles_) return;
    const int cols = min(Kind::kCols, out_.cols - next_.tile * Kind::kCols);
    Format::template load_weights<Kind>(
        in_, next_.slice, cols, [&](int r) { return Kind::weight_row(out_, next_.tile, r); },
        stages_ + stage * Format::kStageBytes, landed_ + stage * 8, lane_);
    next_.advance(num_slices_, warp_);
  }

  /// The lane's share of a slice of x; zeros beyond its rows and columns.
  __device__ void load_rows(int slice, uint4 (&x)[kChunks][kMTiles]) const {
#pragma unroll
    for (int t = 0; t < kMTiles; ++t) {
      const int row = t * kTileM + group_;
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        x[u][t] = row < out_.rows ? Format::load_x(in_, row, slice, u, quad_) : uint4{};
      }
    }
  }

  __device__ void multiply(int slice, uint32_t weights, const uint4 (&x)[kChunks][kMTiles],
                           Sum (&sums)[kMTiles][4]) const {
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      uint4 top;
      uint4 bottom;
      reader_.read(in_, weights, slice, u, top, bottom);
      const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
      const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        mma(sums[m], first, x[u][m].x, x[u][m].y);
        mma(sums[m], second, x[u][m].z, x[u][m].w);
      }
    }
  }

  __device__ void store_partial(const Sum (&sums)[kMTiles][4]) const {
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
    auto* y = static_cast<typename Kind::Element*>(out_.y);
    for (int i = static_cast<int>(threadIdx.x); i < Kind::kCols * out_.rows; i += kThreads) {
      const int col = i % Kind::kCols;
      const int row = i / Kind::kCols;
      const int n = tile * Kind::kCols + col;
      if (n >= out_.cols) continue;
      const auto value = [&](int r) {
        const int weight_row = Kind::weight_row(out_, tile, r);
        const float bias = out_.bias == nullptr ? 0.0f : out_.bias[weight_row];
        return Format::value(in_, row, weight_row, bias, [&](Sum sum) {
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += fixed_.partial[w][r][row];
          return sum;
        });
      };
      y[row * out_.stride + n] = static_cast<typename Kind::Element>(Kind::output(col, value));
    }
  }

  const typename Format::Operands& in_;
  const SkinnyOutput& out_;
  const int num_stages_;
  const int warp_;
  const int lane_;
  const int group_;  // of the fragments: row of A, column of B
  const int quad_;
  const int num_tiles_;
  const int num_slices_;
  const typename Format::Reader reader_;
  Fixed<kMTiles, Sum>& fixed_;
  const uint32_t stages_;  // of this warp
  const uint32_t landed_;
  Place next_;  // what is copied next
};

template <int kMTiles, class Kind, class Format>
__global__ void __launch_bounds__(kThreads, 2)
    skinny_kernel(const __grid_constant__ SkinnyArgs<Format> args) {
  extern __shared__ __align__(128) uint8_t smem[];
  Skinny<kMTiles, Kind, Format>(args, smem).run();
}

/// How a kernel is launched on a device: two blocks to a multiprocessor, or one where two leave no
/// room for enough stages.
struct Launch {
  int resident = 0;  // blocks that the device holds at once
  int stages = 0;
  int smem_bytes = 0;

  Launch(int device, const void* kernel, int stage_bytes, int fixed_bytes) {
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
      return std::min(bytes / (kWarps * stage_bytes), kMaxStages);
    };
    const int blocks = stages_of(2) >= kMinStages ? 2 : 1;
    resident = sms * blocks;
    stages = stages_of(blocks);
    smem_bytes = stages * kWarps * stage_bytes + fixed_bytes;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  }
};

/// On the current device, which is asked and told once.
template <int kMTiles, class Kind, class Format>
const Launch& launch_here() {
  static std::mutex mutex;
  static std::map<int, const Launch> known;  // by device; guarded by mutex
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  const auto kernel = reinterpret_cast<const void*>(skinny_kernel<kMTiles, Kind, Format>);
  constexpr auto kFixedBytes = static_cast<int>(sizeof(Fixed<kMTiles, typename Format::Sum>));
  return known.try_emplace(device, device, kernel, Format::kStageBytes, kFixedBytes).first->second;
}

template <int kMTiles, class Kind, class Format>
void launch_skinny(SkinnyArgs<Format> args, cudaStream_t stream) {
  const Launch& how = launch_here<kMTiles, Kind, Format>();
  args.stages = how.stages;
  // As many blocks as the device holds at once go round all tiles: none waits for another's end.
  const int tiles = (args.out.cols + Kind::kCols - 1) / Kind::kCols;
  const int rounds = (tiles + how.resident - 1) / how.resident;
  const int blocks = (tiles + rounds - 1) / rounds;  // with the same number of tiles each
  launch_overlapped(skinny_kernel<kMTiles, Kind, Format>, static_cast<unsigned>(blocks), kThreads,
                    static_cast<size_t>(how.smem_bytes), stream, args);
}

template <class Kind, class Format>
void launch_skinny(const typename Format::Operands& in, const float* bias, const MatrixView& y,
                   cudaStream_t stream) {
  SkinnyArgs<Format> args;
  args.in = in;
  args.out = {bias, y.data, y.stride, static_cast<int32_t>(y.rows), static_cast<int32_t>(y.cols)};
  y.rows <= kTileM ? launch_skinny<1, Kind>(args, stream) : launch_skinny<2, Kind>(args, stream);
}

}  // namespace longspan::cuda
