#pragma once

#include "backend/cuda/attention.h"
#include "backend/cuda/decode_spans.h"

namespace longspan::cuda {

/// Attention of the sequences that bring few rows, their keys read once per KV head: memory-bound.
/// Device memory of the caller's, within max_decode_sizes.
struct DecodeWork {
  const DecodeSpan* spans = nullptr;
  const DecodeMerge* merges = nullptr;
  const DecodeCounts* counts = nullptr;
  float* partial_out = nullptr;  ///< [partial_rows][head_dim], normalised
  float* partial_lse = nullptr;  ///< [partial_rows], base 2 log-sum-exp; -inf where no key is seen
};

/// How the decode kernels are launched on a device; found once. The shape of a launch depends on
/// the device and the cache only, so that CUDA graphs hold whatever the work list.
struct DecodeLaunch {
  int32_t grid = 0;    ///< thread blocks that the device runs at a time
  int32_t stages = 0;  ///< slices of keys or values that each warp has under way
  int32_t smem_bytes = 0;
  int32_t merge_grid = 0;
};

/// For the current device; head_dim a multiple of 8 up to 256.
cudaError_t plan_decode(const KvLayout& kv, DecodeLaunch* launch);

/// Writes the rows of out that belong to the work list's sequences, and no others.
cudaError_t attention_decode(const AttentionArgs& args, const DecodeWork& work,
                             const DecodeLaunch& launch, cudaStream_t stream);

}  // namespace longspan::cuda
