#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/kv_layout.h"
#include "cuda_check.cuh"
#include "cuda_device_array.cuh"

/// Attention of some rows of one sequence over what its cache stands for, in double precision.
namespace longspan::cuda::bench {

/// Rows of one layer, each with the position that it sees the keys up to.
struct ReferenceArgs {
  KvLayout kv;
  int64_t layer = 0;
  const int32_t* block_table = nullptr;
  const __nv_bfloat16* q = nullptr;    ///< [num_rows][num_heads * 128], as the kernels read them
  const int64_t* positions = nullptr;  ///< [num_rows], growing
  int32_t num_rows = 0;                ///< a multiple of kReferencePairs / group
  int32_t num_heads = 0;
};

inline constexpr int kReferenceDim = 128;
inline constexpr int kReferencePairs = 64;   // (row, head) pairs of a thread block, of one KV head
inline constexpr int kReferenceSplits = 16;  // of the keys, to thread blocks
inline constexpr int kReferenceThreads = 256;

namespace reference {

constexpr int kDim = kReferenceDim;
constexpr int kPairs = kReferencePairs;
constexpr int kKeys = 64;           // at once
constexpr int kPadded = kKeys + 1;  // of rows that are written across
constexpr int kQueryDoubles = kDim * kPadded;
constexpr int kKeyDoubles = kDim * kPadded;
constexpr int kSharedBytes = (kQueryDoubles + kKeyDoubles + kKeys * kPadded) * 8;

__device__ inline double bf16_at(const char* at) {
  return double{__bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at))};
}

/// What element c of a token stands for, not rounded; head: where its KV head begins in a block.
__device__ inline double element_at(const KvTile& tile, const char* head, int token, int c) {
  const int bits = bits_of(tile.element);
  const int byte = c * bits / 8;
  const char* at = head + tile.offset + tile.chunk_offset(token, byte / 16) + byte % 16;
  const char* scales = head + tile.scales + token * tile.scale_bytes;
  switch (tile.element) {
    case KvElement::kInt8:
      return *reinterpret_cast<const int8_t*>(at) * bf16_at(scales);
    case KvElement::kFp8: {
      const auto code = *reinterpret_cast<const __nv_fp8_storage_t*>(at);
      return double{__half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)))} *
             bf16_at(scales);
    }
    case KvElement::kInt6: {
      const auto high = *reinterpret_cast<const uint16_t*>(head + tile.high_offset(token, c / 8));
      const int low = *reinterpret_cast<const uint8_t*>(at) >> (c % 2 * 4) & 15;
      const int upper = high >> (c % 8 / 2 * 4 + (c % 2 == 0 ? 2 : 0)) & 3;
      return (((low | upper << 4) ^ 32) - 32) * bf16_at(scales);
    }
    case KvElement::kInt4: {
      const int code = *reinterpret_cast<const uint8_t*>(at) >> (c % 2 * 4) & 15;
      const char* group = scales + c / static_cast<int>(kInt4Group) * 4;
      return code * bf16_at(group) + bf16_at(group + 2);
    }
    case KvElement::kNative:
      break;
  }
  return bf16_at(at);
}

/// Blocks: [split][tile of pairs][kv_head]. sums: [split][row][head][kDim + 1], of the values by
/// weight and of the weights. Weights are exp(score) as they are: a score of queries and keys like
/// those of cuda_attention_error.cu is below 200, and exp ends at 709.
static __global__ void __launch_bounds__(kReferenceThreads)
    sum_kernel(const __grid_constant__ ReferenceArgs args, double* sums) {
  extern __shared__ double shared[];
  double* queries = shared;                // [kDim][kPadded], by pair
  double* keys = queries + kQueryDoubles;  // [kDim][kPadded], by key; then values [kKeys][kDim]
  double* weights = keys + kKeyDoubles;    // [kKeys][kPadded], by pair
  const auto thread = static_cast<int>(threadIdx.x);
  const auto split = static_cast<int>(blockIdx.x);
  const auto kv_head = static_cast<int>(blockIdx.z);
  const int group = args.num_heads / args.kv.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.y) * (kPairs / group);
  const auto row_of = [&](int pair) { return first_row + pair / group; };
  const auto head_of = [&](int pair) { return kv_head * group + pair % group; };
  for (int i = thread; i < kPairs * kDim; i += kReferenceThreads) {
    const int pair = i / kDim;
    const int64_t at = (int64_t{row_of(pair)} * args.num_heads + head_of(pair)) * kDim + i % kDim;
    queries[i % kDim * kPadded + pair] = double{__bfloat162float(args.q[at])};
  }

  // A thread has pairs y + 16 i, of which it weighs keys x + 16 j and sums columns x + 16 j.
  const int x = thread % 16;
  const int y = thread / 16;
  int64_t seen[4];
  for (int i = 0; i < 4; ++i) seen[i] = args.positions[row_of(y + 16 * i)] + 1;
  double out[4][8] = {};
  double total[4] = {};
  const int64_t num_keys = args.positions[row_of(kPairs - 1)] + 1;
  const int64_t tiles = (num_keys + kKeys - 1) / kKeys;
  const int64_t end = min((tiles * (split + 1)) / kReferenceSplits * kKeys, num_keys);
  const double scale = 1.0 / sqrt(double{kDim});
  for (int64_t first = tiles * split / kReferenceSplits * kKeys; first < end; first += kKeys) {
    const int64_t block = args.block_table[first / args.kv.block_len];
    const auto in_block = static_cast<int>(first % args.kv.block_len);
    const auto here = static_cast<int>(min(end - first, int64_t{kKeys}));
    const char* head = args.kv.key_tile(block, args.layer, kv_head);
    __syncthreads();
    for (int i = thread; i < kKeys * kDim; i += kReferenceThreads) {
      const int key = i / kDim;
      keys[i % kDim * kPadded + key] =
          key < here ? element_at(args.kv.key, head, in_block + key, i % kDim) : 0;
    }
    __syncthreads();
    double score[4][4] = {};
#pragma unroll 4
    for (int c = 0; c < kDim; ++c) {
      double q[4];
      double k[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = queries[c * kPadded + y + 16 * i];
#pragma unroll
      for (int j = 0; j < 4; ++j) k[j] = keys[c * kPadded + x + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) score[i][j] += q[i] * k[j];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = x + 16 * j;
        const double weight = first + key < seen[i] ? exp(score[i][j] * scale) : 0;
        total[i] += weight;
        weights[key * kPadded + y + 16 * i] = weight;
      }
    }
    __syncthreads();
    for (int i = thread; i < kKeys * kDim; i += kReferenceThreads) {
      const int key = i / kDim;
      keys[i] = key < here ? element_at(args.kv.value, head, in_block + key, i % kDim) : 0;
    }
    __syncthreads();
#pragma unroll 2
    for (int key = 0; key < kKeys; ++key) {
      double w[4];
      double v[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = weights[key * kPadded + y + 16 * i];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = keys[key * kDim + x + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) out[i][j] += w[i] * v[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int step = 8; step > 0; step /= 2) {
      total[i] += __shfl_xor_sync(0xffffffff, total[i], step, 16);
    }
    const int pair = y + 16 * i;
    double* to =
        sums + ((int64_t{split} * args.num_rows + row_of(pair)) * args.num_heads + head_of(pair)) *
                   (kDim + 1);
#pragma unroll
    for (int j = 0; j < 8; ++j) to[x + 16 * j] = out[i][j];
    if (x == 0) to[kDim] = total[i];
  }
}

/// Blocks: [row and head]. out: [row][head][kDim].
static __global__ void merge_kernel(const double* sums, int64_t stride, double* out) {
  double sum = 0;
  double total = 0;
  for (int split = 0; split < kReferenceSplits; ++split) {
    const double* from = sums + split * stride + int64_t{blockIdx.x} * (kDim + 1);
    sum += from[threadIdx.x];
    total += from[kDim];
  }
  out[int64_t{blockIdx.x} * kDim + threadIdx.x] = sum / total;
}

}  // namespace reference

/// [num_rows][num_heads][128]. Takes 18 KiB of device memory for each row and head meanwhile.
inline std::vector<double> reference_rows(const ReferenceArgs& args) {
  using namespace reference;
  const int pairs = args.num_rows * args.num_heads;
  const int64_t stride = int64_t{pairs} * (kDim + 1);
  const DeviceArray<double> sums(static_cast<size_t>(stride * kReferenceSplits));
  const DeviceArray<double> out(static_cast<size_t>(pairs) * kDim);
  CUDA_CHECK(
      cudaFuncSetAttribute(sum_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int group = args.num_heads / args.kv.num_kv_heads;
  const dim3 grid(kReferenceSplits, static_cast<unsigned>(args.num_rows * group / kPairs),
                  static_cast<unsigned>(args.kv.num_kv_heads));
  sum_kernel<<<grid, kReferenceThreads, kSharedBytes>>>(args, sums.get());
  CUDA_CHECK(cudaGetLastError());
  merge_kernel<<<static_cast<unsigned>(pairs), kDim>>>(sums.get(), stride, out.get());
  CUDA_CHECK(cudaGetLastError());
  CUDA_CHECK(cudaDeviceSynchronize());
  return out.download();
}

}  // namespace longspan::cuda::bench
