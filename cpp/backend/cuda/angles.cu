#include "backend/cuda/angles.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

/// The last sequence that begins at or before the row, if the row is one of its own.
__device__ int32_t sequence_of(const PlanView& plan, int32_t row) {
  int32_t low = 0;
  int32_t high = plan.num_seqs;  // the first that begins after the row
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    plan.seqs[middle].first_row <= row ? low = middle + 1 : high = middle;
  }
  const int32_t seq = low - 1;
  if (seq < 0) return -1;
  return row - plan.seqs[seq].first_row < plan.seqs[seq].num_rows ? seq : -1;
}

/// A thread to a row's pair, a warp or more to a row.
__global__ void fill_angles_kernel(PlanView plan, int32_t* row_seq, float* cos_sin) {
  const int32_t row = static_cast<int32_t>(blockIdx.x * blockDim.y + threadIdx.y);
  if (row >= plan.num_tokens) return;
  const int32_t index = sequence_of(plan, row);
  if (threadIdx.x == 0) row_seq[row] = index;
  if (index < 0) return;
  const SeqView& seq = plan.seqs[index];
  const auto position = static_cast<double>(seq.first_position + row - seq.first_row);
  const double* inv_freq = plan.inv_freq + int64_t{seq.profile} * plan.rotary_pairs;
  auto* out = reinterpret_cast<float2*>(cos_sin) + int64_t{row} * plan.rotary_pairs;
  for (int i = static_cast<int>(threadIdx.x); i < plan.rotary_pairs; i += blockDim.x) {
    double sine;
    double cosine;
    sincos(position * inv_freq[i], &sine, &cosine);
    out[i] = {static_cast<float>(cosine), static_cast<float>(sine)};
  }
}

}  // namespace

void fill_angles(const PlanView& plan, int32_t* row_seq, float* cos_sin, cudaStream_t stream) {
  if (plan.num_tokens == 0) return;
  const dim3 block(32, kThreads / 32);
  const auto blocks = (static_cast<unsigned>(plan.num_tokens) + block.y - 1) / block.y;
  fill_angles_kernel<<<blocks, block, 0, stream>>>(plan, row_seq, cos_sin);
}

}  // namespace longspan::cuda
