#include "backend/cuda/fp8_values.h"
#include "backend/cuda/sm90.cuh"
#include "backend/cuda/staged_seqs.cuh"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

constexpr int kHeadDim = 128;
constexpr int kRowChunks = kHeadDim / 8;       // of 16 bytes, in a value of bfloat16
constexpr int kStepTokens = 2 * kPanelTokens;  // that share a scale
constexpr int kThreads = 512;
constexpr int kLoads = kStepTokens * kRowChunks / kThreads;

/// What a step of this largest magnitude is multiplied by, a power of two.
__device__ inline float scale_of(float largest) {
  constexpr float kLeast = 0x1p-100f;
  int exponent;
  const float fraction = frexpf(fmaxf(largest, kLeast), &exponent);  // 0.5 to 1
  constexpr float kMostFraction = 448.0f / 512.0f;
  return ldexpf(1.0f, exponent - (fraction > kMostFraction ? 8 : 9));
}

/// Blocks: [panel][kv_head], of which one of a first panel of a step does both.
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ QuantizeValuesArgs args) {
  __shared__ uint4 values[kStepTokens][kRowChunks];
  const auto panel = static_cast<int>(blockIdx.x);
  const auto kv_head = static_cast<int>(blockIdx.y);
  const int seq = seq_of_panel(args.to.seqs, args.seqs, args.num_seqs, panel);
  const int in_seq = panel - static_cast<int>(args.to.seqs[seq].table);
  if (in_seq % 2 != 0) return;
  const CachedRows rows(args, args.from.value, seq, kv_head);
  const int count = rows.count();
  const int first = in_seq * kPanelTokens;

  const auto thread = static_cast<int>(threadIdx.x);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int token = (i * kThreads + thread) / kRowChunks;
    const int chunk = thread % kRowChunks;
    uint4 bits{};
    if (first + token < count) {
      bits = *reinterpret_cast<const uint4*>(rows.at(first + token, chunk));
    }
    values[token][chunk] = bits;
    const Eight x = eight_of(bits);
#pragma unroll
    for (const float element : x.x) largest = fmaxf(largest, fabsf(element));
  }
  const float scale = scale_of(largest_of_block<kThreads>(largest));
  const float inverse = 1.0f / scale;

  const int64_t at = int64_t{kv_head} * args.to.num_panels + panel;
  const int panels = min(2, (count - first + kPanelTokens - 1) / kPanelTokens);
  // A thread's: two rows of 16 tokens.
  constexpr int kPairs = kHeadDim / 2;
  const int pair = thread % kPairs;
  const int chunk = thread / kPairs;
  static_assert(kThreads / kPairs * 16 == kStepTokens);
  if (chunk / 4 >= panels) return;
  uint32_t words[2][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    float x[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 16 * chunk + 8 * (i / 2) + 2 * t + i % 2;
      const uint32_t bits = reinterpret_cast<const uint32_t*>(values[token])[pair];
      x[0][i] = __uint_as_float(bits << 16) * inverse;
      x[1][i] = __uint_as_float(bits & 0xffff0000U) * inverse;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) words[r][t] = pack_e4m3(x[r][0], x[r][1], x[r][2], x[r][3]);
  }
  char* to = args.to.panels + (at + chunk / 4) * kPanelBytes;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 2 * pair + r;
    *reinterpret_cast<uint4*>(to + row * kPanelTokens + (chunk % 4 ^ row / 2 % 4) * 16) =
        make_uint4(words[r][0], words[r][1], words[r][2], words[r][3]);
  }
  if (thread < panels) args.to.scales[at + thread] = scale;
}

}  // namespace

cudaError_t quantize_values(const QuantizeValuesArgs& args, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(args.to.num_panels),
                    static_cast<unsigned>(args.from.num_kv_heads));
  quantize_kernel<<<blocks, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace longspan::cuda
