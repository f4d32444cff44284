#include "backend/cuda/dequantize_kv.h"
#include "backend/cuda/kv_element.cuh"
#include "backend/cuda/staged_seqs.cuh"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // chunks that a thread has under way

/// Eight codes, as quantize8() gives them, as a chunk of bfloat16, in order.
template <KvElement element>
__device__ uint4 dequantize8(uint2 codes, uint32_t scales) {
  constexpr int kPairs = kHalfWord<element>;
  const uint32_t words[2] = {codes.x, codes.y};
  uint32_t result[4];
#pragma unroll
  for (int w = 0; w < 4 / kPairs; ++w) {
    uint32_t pairs[kPairs];
    if constexpr (element == KvElement::kInt6) {
      widen_int6(codes.x, codes.y, pairs);
    } else {
      widen<element>(words[w], pairs);
    }
#pragma unroll
    for (uint32_t& pair : pairs) {
      pair = element == KvElement::kInt4 ? scaled(pair, twice_low(scales), twice_high(scales))
                                         : as_bits(__hmul2(as_bf16x2(pair), twice_low(scales)));
    }
    // Element i is the low half of pair i, element i + kPairs its high half.
#pragma unroll
    for (int i = 0; i < kPairs; i += 2) {
      result[w * kPairs + i / 2] = __byte_perm(pairs[i], pairs[i + 1], 0x5410);
      result[w * kPairs + (i + kPairs) / 2] = __byte_perm(pairs[i], pairs[i + 1], 0x7632);
    }
  }
  return make_uint4(result[0], result[1], result[2], result[3]);
}

/// A panel's tokens of the keys or the values of a head.
template <KvElement element>
__device__ void dequantize_panel(const DequantizeKvArgs& args, const KvTile& from,
                                 const KvTile& to) {
  constexpr int kShare = 16 / bits_of(element);  // chunks of `to` from one of `from`
  const auto panel = static_cast<int>(blockIdx.x);
  const int seq = seq_of_panel(args.staged, args.seqs, args.num_seqs, panel);
  const int first_token = (panel - static_cast<int>(args.staged[seq].table)) * kPanelTokens;
  const SeqView& view = args.plan.seqs[seq];
  const int num_tokens =
      args.plan.context.keys(static_cast<int>(view.first_position) + view.num_rows) - first_token;
  const int block = args.plan.block_tables[view.table + first_token / args.from.block_len];
  const int in_block = first_token % args.from.block_len;
  const char* head =
      args.from.key_tile(block, args.layer, args.first_kv_head + static_cast<int>(blockIdx.y));
  char* tile = args.to.key_tile(panel, 0, blockIdx.y) + to.offset;
  const int shift = __ffs(args.from.row_dim / 8) - 1;  // row_dim is a power of two
  for (int first = static_cast<int>(threadIdx.x); first < kPanelTokens << shift;
       first += kAtOnce * kThreads) {
    uint2 codes[kAtOnce] = {};
    uint32_t scales[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = (first + i * kThreads) >> shift;
      const int chunk = (first + i * kThreads) & ((1 << shift) - 1);
      if (token >= min(num_tokens, kPanelTokens)) continue;
      const char* at = head + from.offset + from.chunk_offset(in_block + token, chunk / kShare) +
                       chunk % kShare * (16 / kShare);
      const char* by = head + from.scales + (in_block + token) * from.scale_bytes;
      if constexpr (element == KvElement::kInt4) {
        codes[i].x = *reinterpret_cast<const uint32_t*>(at);
        scales[i] = reinterpret_cast<const uint32_t*>(by)[chunk * 8 / kInt4Group];
      } else if constexpr (element == KvElement::kInt6) {
        codes[i].x = *reinterpret_cast<const uint32_t*>(at);
        codes[i].y =
            *reinterpret_cast<const uint16_t*>(head + from.high_offset(in_block + token, chunk));
        scales[i] = *reinterpret_cast<const uint16_t*>(by);
      } else {
        codes[i] = *reinterpret_cast<const uint2*>(at);
        scales[i] = *reinterpret_cast<const uint16_t*>(by);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = (first + i * kThreads) >> shift;
      const int chunk = (first + i * kThreads) & ((1 << shift) - 1);
      if (token >= kPanelTokens || chunk * 8 >= args.to.row_dim) continue;
      *reinterpret_cast<uint4*>(tile + to.chunk_offset(token, chunk)) =
          dequantize8<element>(codes[i], scales[i]);
    }
  }
}

/// Blocks: [panel][head][keys, values].
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const __grid_constant__ DequantizeKvArgs args) {
  const KvTile& from = blockIdx.z == 0 ? args.from.key : args.from.value;
  const KvTile& to = blockIdx.z == 0 ? args.to.key : args.to.value;
  switch (from.element) {
    case KvElement::kInt8:
      return dequantize_panel<KvElement::kInt8>(args, from, to);
    case KvElement::kFp8:
      return dequantize_panel<KvElement::kFp8>(args, from, to);
    case KvElement::kInt6:
      return dequantize_panel<KvElement::kInt6>(args, from, to);
    case KvElement::kInt4:
      return dequantize_panel<KvElement::kInt4>(args, from, to);
    case KvElement::kNative:
      return;
  }
}

}  // namespace

cudaError_t dequantize_kv(const DequantizeKvArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.num_panels),
                  static_cast<unsigned>(args.to.num_kv_heads), 2);
  dequantize_kernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace longspan::cuda
