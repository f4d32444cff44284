#include <algorithm>
#include <type_traits>

#include "backend/cuda/overlap.cuh"
#include "backend/cuda/rows.h"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A matrix as kernels see it.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<T> rows_of(const MatrixView& m) {
  return {static_cast<T*>(m.data), m.stride};
}

/// A grid of x blocks along a row and y blocks down the rows.
struct Shape {
  dim3 grid;
  dim3 block;
};

/// One thread to eight elements, several short rows to a block.
Shape shape_of(int64_t rows, int64_t cols) {
  const int64_t groups = ceil_div(cols, 8);
  int x = 32;
  while (x < kThreads && x < groups) x *= 2;
  const int y = kThreads / x;
  return {dim3(static_cast<unsigned>(ceil_div(groups, x)),
               static_cast<unsigned>(std::min(ceil_div(rows, y), kMaxBlocks - 1))),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(y))};
}

/// Calls fn(row, first col, cols there) for every eight elements of rows x cols.
template <class Fn>
__device__ void for_each_eight(int64_t rows, int64_t cols, Fn fn) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 8;
  if (col >= cols) return;
  const int count = static_cast<int>(min(int64_t{8}, cols - col));
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += step) {
    fn(row, col, count);
  }
}

/// out[i] = in[index[i]]; a null index is i itself.
template <bool kAligned, class In, class Out, class Index>
__global__ void copy_kernel(Rows<const In> in, const Index* index, Rows<Out> out, int64_t rows,
                            int64_t cols) {
  for_each_eight(rows, cols, [&](int64_t row, int64_t col, int count) {
    const In* from = in[index == nullptr ? row : static_cast<int64_t>(index[row])] + col;
    store_part<kAligned>(load_part<kAligned>(from, count), out[row] + col, count);
  });
}

/// out[t] = table[id of t - first_token], zeros where that is not in [0, table_rows).
template <bool kAligned>
__global__ void embedding_kernel(const int32_t* token_ids, const int32_t* drawn,
                                 Rows<const bf16> table, int64_t table_rows, int32_t first_token,
                                 Rows<float> out, int64_t rows, int64_t cols) {
  for_each_eight(rows, cols, [&](int64_t row, int64_t col, int count) {
    const int32_t id = token_ids[row];
    const int64_t from = int64_t{id < 0 ? drawn[-1 - id] : id} - first_token;
    Eight values = {};
    if (from >= 0 && from < table_rows) values = load_part<kAligned>(table[from] + col, count);
    store_part<kAligned>(values, out[row] + col, count);
  });
}

template <class Index>
void copy(const MatrixView& in, const Index* index, const MatrixView& out, cudaStream_t stream) {
  if (out.rows == 0) return;
  const auto [grid, block] = shape_of(out.rows, out.cols);
  with_type(in.dtype, [&](auto* in_type) {
    with_type(out.dtype, [&](auto* out_type) {
      using In = std::remove_pointer_t<decltype(in_type)>;
      using Out = std::remove_pointer_t<decltype(out_type)>;
      const auto kernel = has_whole_eights(in) && has_whole_eights(out)
                              ? copy_kernel<true, In, Out, Index>
                              : copy_kernel<false, In, Out, Index>;
      kernel<<<grid, block, 0, stream>>>(rows_of<const In>(in), index, rows_of<Out>(out), out.rows,
                                         out.cols);
    });
  });
}

template <bool kAligned>
__global__ void silu_mul_kernel(Rows<const bf16> gate_up, Rows<bf16> out, int64_t rows,
                                int64_t cols) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  for_each_eight(rows, cols, [&](int64_t row, int64_t col, int count) {
    const bf16* gates = gate_up[row] + col;
    const Eight gate = load_part<kAligned>(gates, count);
    const Eight up = load_part<kAligned>(gates + cols, count);
    Eight y;
#pragma unroll
    for (int i = 0; i < 8; ++i) y.x[i] = gate.x[i] / (1.0f + expf(-gate.x[i])) * up.x[i];
    store_part<kAligned>(y, out[row] + col, count);
  });
}

/// A block to a row, or a warp to each of several rows; a thread keeps kEights groups of eight
/// elements in registers, so that the residual is read once.
template <bool kAligned, int kEights>
__global__ void rms_norm_kernel(Rows<const bf16> delta, Rows<float> residual, const float* weight,
                                float eps, Rows<bf16> out, int64_t rows, int cols) {
  __shared__ float partial[32];
  let_next_kernel_start();
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool inside = row < rows;  // whole warps are inside or not
  Eight x[kEights];
  Eight w[kEights];  // nobody writes them: no need to wait
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int col = static_cast<int>(threadIdx.x + e * blockDim.x) * 8;
    if (col < cols) w[e] = load_part<kAligned>(weight + col, min(8, cols - col));
  }
  wait_for_previous_kernel();
  float squares = 0.0f;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int col = static_cast<int>(threadIdx.x + e * blockDim.x) * 8;
    x[e] = {};
    if (!inside || col >= cols) continue;
    const int count = min(8, cols - col);
    x[e] = load_part<kAligned>(residual[row] + col, count);
    if (delta.data != nullptr) {
      const Eight d = load_part<kAligned>(delta[row] + col, count);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[e].x[i] += d.x[i];
      store_part<kAligned>(x[e], residual[row] + col, count);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += x[e].x[i] * x[e].x[i];
  }
  squares = sum_lanes<32>(squares);
  if (blockDim.x > 32) {  // the block's warps share one row
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = squares;
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x / 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    squares = sum_lanes<32>(lane < warps ? partial[lane] : 0.0f);
  }
  if (!inside) return;
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(cols) + eps);
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int col = static_cast<int>(threadIdx.x + e * blockDim.x) * 8;
    if (col >= cols) continue;
    const int count = min(8, cols - col);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[e].x[i] = x[e].x[i] * scale * w[e].x[i];
    store_part<kAligned>(x[e], out[row] + col, count);
  }
}

template <int kEights>
void launch_rms_norm(const MatrixView* delta, const MatrixView& residual, const float* weight,
                     float eps, const MatrixView& out, cudaStream_t stream) {
  const int64_t per_thread = 8 * kEights;
  const int64_t threads = ceil_div(residual.cols, per_thread * 32) * 32;
  const int64_t rows_per_block = threads == 32 ? 4 : 1;
  const bool aligned = has_whole_eights(residual) && has_whole_eights(out) &&
                       (delta == nullptr || has_whole_eights(*delta)) &&
                       reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  const auto kernel = aligned ? rms_norm_kernel<true, kEights> : rms_norm_kernel<false, kEights>;
  launch_overlapped(kernel, static_cast<unsigned>(ceil_div(residual.rows, rows_per_block)),
                    dim3(static_cast<unsigned>(threads), static_cast<unsigned>(rows_per_block)), 0,
                    stream, delta == nullptr ? Rows<const bf16>{} : rows_of<const bf16>(*delta),
                    rows_of<float>(residual), weight, eps, rows_of<bf16>(out), residual.rows,
                    static_cast<int>(residual.cols));
}

}  // namespace

void embedding(const int32_t* token_ids, const int32_t* drawn, const MatrixView& table,
               int32_t first_token, const MatrixView& out, cudaStream_t stream) {
  if (out.rows == 0) return;
  const auto [grid, block] = shape_of(out.rows, out.cols);
  const auto kernel = has_whole_eights(table) && has_whole_eights(out) ? embedding_kernel<true>
                                                                       : embedding_kernel<false>;
  kernel<<<grid, block, 0, stream>>>(token_ids, drawn, rows_of<const bf16>(table), table.rows,
                                     first_token, rows_of<float>(out), out.rows, out.cols);
}

void gather_rows(const MatrixView& in, const int64_t* rows, const MatrixView& out,
                 cudaStream_t stream) {
  copy(in, rows, out, stream);
}

void convert(const MatrixView& in, const MatrixView& out, cudaStream_t stream) {
  copy<int64_t>(in, nullptr, out, stream);
}

void silu_mul(const MatrixView& gate_up, const MatrixView& out, cudaStream_t stream) {
  if (out.rows == 0) return;
  const auto [grid, block] = shape_of(out.rows, out.cols);
  const bool aligned = has_whole_eights(gate_up) && has_whole_eights(out);
  const auto kernel = aligned ? silu_mul_kernel<true> : silu_mul_kernel<false>;
  launch_overlapped(kernel, grid, block, 0, stream, rows_of<const bf16>(gate_up),
                    rows_of<bf16>(out), out.rows, out.cols);
}

void rms_norm(const MatrixView* delta, const MatrixView& residual, const float* weight, float eps,
              const MatrixView& out, cudaStream_t stream) {
  if (residual.rows == 0) return;
  constexpr int64_t kMaxThreads = 1024;
  const auto launch = residual.cols <= 8 * kMaxThreads ? launch_rms_norm<1> : launch_rms_norm<4>;
  launch(delta, residual, weight, eps, out, stream);
}

}  // namespace longspan::cuda
