#include <algorithm>
#include <cmath>

#include "backend/cuda/int8_matrix.h"
#include "backend/cuda/kv_quantize.cuh"
#include "backend/cuda/overlap.cuh"
#include "backend/cuda/turn.cuh"

namespace longspan::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int64_t kMaxThreads = 512;   // whose parts are 16384 columns
constexpr int kLanes = 8;              // next to each other, to 64 columns next to each other
constexpr int kEights = 4;             // of a thread, 64 columns apart
constexpr int kCols = kEights * 8;     // of a thread at once
constexpr int kStep = kLanes * kCols;  // of eight lanes at once

/// Where they are turned, the eights of a thread follow those of seven neighbours, so that half of
/// the sums of a run need no other thread.
struct Part {
  Eight eight[kEights];

  /// Turns runs of `run` columns, still to be divided by its root. For all lanes of a warp to call.
  __device__ void turn(int run) {
    const auto lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (Eight& x : eight) turn_run(lane, kLanes, x);
#pragma unroll
    for (int half = 1; half < kEights; half *= 2) {
      if (run <= half * kLanes * 8) break;
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        if ((e & half) != 0) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float a = eight[e].x[i];
          const float b = eight[e + half].x[i];
          eight[e].x[i] = a + b;
          eight[e + half].x[i] = a - b;
        }
      }
    }
    for (int step = kLanes; step * kCols < run; step *= 2) {
#pragma unroll
      for (Eight& x : eight) turn_step(lane, step, x);
    }
  }
};

/// A block to a row. A thread keeps its part where kWhole says that all have one part at most; a
/// longer row is read twice.
template <bool kAligned, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 2)
    quantize_kernel(const bf16* in, int64_t stride, int cols, Int8Matrix out, int64_t first_row,
                    int run, float factor) {
  __shared__ uint32_t of_warps[kMaxThreads / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const bf16* from = in + blockIdx.x * stride;
  const int64_t row = first_row + blockIdx.x;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  const auto width = static_cast<int>(out.cols);
  const int own_col = thread / kLanes * kStep + thread % kLanes * 8;

  KvRange range;
  const auto turned = [&](int begin) {
    Part part{};
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int col = begin + own_col + e * kLanes * 8;
      if (col < cols) part.eight[e] = load_part<kAligned>(from + col, min(8, cols - col));
    }
    part.turn(run);
    return part;
  };
  const auto add = [&](const Part& part) {
#pragma unroll
    for (const Eight& x : part.eight) range.add(x);
  };
  const int step = threads * kCols;
  const Part first = turned(0);
  add(first);
  if constexpr (!kWhole) {
    for (int begin = step; begin < width; begin += step) add(turned(begin));
  }
  range.merge_magnitudes<32>();
  if (thread % 32 == 0) of_warps[thread / 32] = range.magnitude;
  __syncthreads();
  for (int warp = 0; warp < threads / 32; ++warp) {
    range.magnitude = max(range.magnitude, of_warps[warp]);
  }
  const float scale = range.is_finite() ? fmaxf(range.largest() / 127.0f, kLeastScale) : NAN;
  if (thread == 0) out.scales[row] = scale * factor;

  const auto store = [&](int begin, const Part& part) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int col = begin + own_col + e * kLanes * 8;
      if (col >= width) continue;
      const int64_t slice = col / kInt8Slice;
      const int chunk = col % kInt8Slice / 16 ^ static_cast<int>(row % 8);
      int8_t* to = out.codes + (slice * out.rows + row) * kInt8Slice + chunk * 16 + col % 16;
      *reinterpret_cast<uint2*>(to) = quantize8<KvElement::kInt8>(part.eight[e], {scale, 0.0f});
    }
  };
  if constexpr (kWhole) {
    store(0, first);
  } else {
    for (int begin = 0; begin < width; begin += step) store(begin, turned(begin));
  }
}

}  // namespace

void quantize_rows(const MatrixView& in, const Int8Matrix& out, int64_t first_row,
                   cudaStream_t stream) {
  if (in.rows == 0) return;
  constexpr int64_t kWarpCols = int64_t{32} * kCols;
  const int64_t threads = std::min(kMaxThreads, (out.cols + kWarpCols - 1) / kWarpCols * 32);
  const bool whole = threads * kCols >= out.cols;
  const auto kernel = has_whole_eights(in)
                          ? (whole ? quantize_kernel<true, true> : quantize_kernel<true, false>)
                          : (whole ? quantize_kernel<false, true> : quantize_kernel<false, false>);
  const auto run = static_cast<int>(out.run());
  launch_overlapped(kernel, static_cast<unsigned>(in.rows), static_cast<unsigned>(threads), 0,
                    stream, in.row<const bf16>(0), in.stride, static_cast<int>(in.cols), out,
                    first_row, run, 1.0f / std::sqrt(static_cast<float>(run)));
}

}  // namespace longspan::cuda
