#include "backend/cuda/partial_attention.h"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

/// A block to a row; eight elements, which are of one head, to a thread at a time.
__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const float* log_sum_exps, int64_t stride, int parts, int own, int num_heads,
                 int head_dim, __nv_bfloat16* attention, int64_t attention_stride) {
  const float* sums = log_sum_exps + int64_t{blockIdx.x} * stride;
  __nv_bfloat16* row = attention + int64_t{blockIdx.x} * attention_stride;
  for (int col = static_cast<int>(threadIdx.x) * 8; col < num_heads * head_dim;
       col += kThreads * 8) {
    const int head = col / head_dim;
    const float mine = sums[own * num_heads + head];
    float total = 0.0f;  // over the parts, in units of this one
    for (int part = 0; part < parts; ++part) total += expf(sums[part * num_heads + head] - mine);
    const float weight = mine == -INFINITY ? 0.0f : 1.0f / total;
    Eight values = load8(row + col);
#pragma unroll
    for (float& value : values.x) value *= weight;
    store8(values, row + col);
  }
}

/// A block to a row.
__global__ void __launch_bounds__(kThreads)
    clear_kernel(const __grid_constant__ AttentionArgs args) {
  const auto row = static_cast<int32_t>(blockIdx.x);
  const int32_t index = args.plan.row_seq[row];
  if (index < 0) return;
  const SeqView& seq = args.plan.seqs[index];
  if (args.plan.context.keys(seq.first_position + row - seq.first_row + 1) > 0) return;
  const int cols = args.num_heads * args.kv.head_dim;
  for (int col = static_cast<int>(threadIdx.x) * 8; col < cols; col += kThreads * 8) {
    store8({}, args.out + row * args.out_stride + col);
  }
  for (int head = static_cast<int>(threadIdx.x); head < args.num_heads; head += kThreads) {
    args.log_sum_exp[row * args.log_sum_exp_stride + head] = -INFINITY;
  }
}

}  // namespace

void weigh_partial_attention(const MatrixView& log_sum_exps, int64_t own, int64_t num_heads,
                             const MatrixView& attention, cudaStream_t stream) {
  if (attention.rows == 0) return;
  weigh_kernel<<<static_cast<unsigned>(attention.rows), kThreads, 0, stream>>>(
      static_cast<const float*>(log_sum_exps.data), log_sum_exps.stride,
      static_cast<int>(log_sum_exps.cols / num_heads), static_cast<int>(own),
      static_cast<int>(num_heads), static_cast<int>(attention.cols / num_heads),
      static_cast<__nv_bfloat16*>(attention.data), attention.stride);
}

void clear_unseeing_rows(const AttentionArgs& args, cudaStream_t stream) {
  clear_kernel<<<static_cast<unsigned>(args.plan.num_tokens), kThreads, 0, stream>>>(args);
}

}  // namespace longspan::cuda
