#include <algorithm>
#include <utility>

#include "backend/cuda/attention_decode.h"
#include "backend/cuda/decode_finish.cuh"
#include "backend/cuda/decode_loader.cuh"
#include "backend/cuda/decode_merge.cuh"
#include "backend/cuda/decode_tile.cuh"
#include "backend/cuda/overlap.cuh"

namespace longspan::cuda {
namespace decode {
namespace {

template <class C>
__global__ void __launch_bounds__(C::kThreads, kBlocks)
    decode_kernel(const __grid_constant__ AttentionArgs args,
                  const __grid_constant__ DecodeWork work, int num_stages) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const int warp_bytes = num_stages / 2 * C::kTwoStages;
  auto& shared = *reinterpret_cast<Fixed<C>*>(smem + C::kWarps * warp_bytes);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t stages = smem_address(smem) + warp * warp_bytes;
  const uint32_t landed = smem_address(shared.landed[warp]);
  init_landed(landed, num_stages, lane);

  // The plan was there before the step began, and so were all keys but the step's own.
  const Units units{work.counts->num_spans * args.kv.num_kv_heads, args.kv.num_kv_heads};
  SliceLoader<C> loader(args, work, units, warp, lane);
  int stage = 0;
  for (; stage < num_stages && loader.next_is_old(); ++stage) {
    loader.load(stages + C::stage(stage), landed + stage * 8);
  }
  wait_for_previous_kernel();
  for (; stage < num_stages; ++stage) {
    loader.load(stages + C::stage(stage), landed + stage * 8);
  }
  stage = 0;
  uint32_t parity = 0;
  const auto wait = [&] {
    mbarrier_wait(landed + stage * 8, parity);
    __syncwarp();
    return stages + C::stage(stage);
  };
  const auto release = [&] {
    __syncwarp();
    loader.load(stages + C::stage(stage), landed + stage * 8);
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  };

  let_next_kernel_start();

  const int group = args.num_heads / args.kv.num_kv_heads;
  DecodeSpan next_span;
  SeqView next_seq;
  const auto read_ahead = [&](int unit) {
    if (unit >= units.count) return;
    next_span = work.spans[units.span(unit)];
    next_seq = args.plan.seqs[next_span.seq];
  };
  read_ahead(blockIdx.x);
  for (int unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const DecodeSpan span = next_span;
    const SeqView seq = next_seq;
    const int kv_head = units.kv_head(unit);
    for (int i = threadIdx.x; i < kDecodePairs * (C::kRowDim / 8); i += C::kThreads) {
      const int pair = i / (C::kRowDim / 8);
      const int chunk = i % (C::kRowDim / 8);
      uint4 q = make_uint4(0, 0, 0, 0);
      if (pair < span.num_pairs && chunk * 8 < args.kv.head_dim) {
        const PairPlace place(args, seq, kv_head, span.first_pair + pair);
        q = *reinterpret_cast<const uint4*>(args.q + place.row * args.q_stride + place.col +
                                            chunk * 8);
      }
      put_query<C>(shared, pair, chunk, q);
    }
    __syncthreads();
    const Queries<C> queries(smem_address(shared.q), lane);
    float factor[2] = {seq.scale_log2, seq.scale_log2};
    if constexpr (C::Key::kIntegers) {
      factor[0] *= shared.q_scale[lane % 4 * 2];
      factor[1] *= shared.q_scale[lane % 4 * 2 + 1];
    }

    // Keys of the span that the lane's two pairs see, and those that every pair sees.
    const auto visible = [&](int pair) {
      const int position = static_cast<int>(seq.first_position) + (span.first_pair + pair) / group;
      return max(0, min(span.num_keys, args.plan.context.keys(position + 1) - span.first_key));
    };
    const int visible_here[2] = {visible(min(lane % 4 * 2, span.num_pairs - 1)),
                                 visible(min(lane % 4 * 2 + 1, span.num_pairs - 1))};
    const int visible_to_all = visible(0);

    read_ahead(unit + gridDim.x);
    Softmax<C> softmax;
    for (int key = warp * C::kKeys; key < span.num_keys; key += C::kWarps * C::kKeys) {
      float scores[C::kKeys / 16][4];
      const uint32_t keys = wait();
      multiply_keys<C>(queries, keys, lane, scores);
      multiply_scales<typename C::Key>(keys, lane, factor, scores);
      release();
      if (key + C::kKeys > visible_to_all) {
#pragma unroll
        for (int t = 0; t < C::kKeys / 16; ++t) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (key + t * 16 + c / 2 * 8 + lane / 4 >= visible_here[c % 2]) {
              scores[t][c] = -INFINITY;
            }
          }
        }
      }
      softmax.weigh(scores);
      const uint32_t values = wait();
      if (key + C::kKeys > span.num_keys) {
        zero_rows<typename C::Value>(values, span.num_keys - key, lane);
      }
      if constexpr (!C::Value::kNative) {
        multiply_scales<typename C::Value>(values, lane, {1, 1}, scores);
      }
      multiply_values<C>(scores, values, lane, softmax.out);
      release();
    }
    finish_span(args, work, span, seq, kv_head, softmax, shared);
  }
}

/// What is compiled for a cache.
struct Variant {
  void (*kernel)(AttentionArgs, DecodeWork, int);
  int warps;
  int two_stages;
  int fixed_bytes;
};

template <KvElement key, KvElement value, int row_dim>
Variant variant() {
  using C = Cache<key, value, row_dim>;
  return {decode_kernel<C>, C::kWarps, C::kTwoStages, sizeof(Fixed<C>)};
}

template <KvElement key, KvElement value>
Variant quantized_variant(int row_dim) {
  return row_dim == 64    ? variant<key, value, 64>()
         : row_dim == 128 ? variant<key, value, 128>()
                          : variant<key, value, 256>();
}

Variant variant_of(const KvLayout& kv) {
  constexpr KvElement kNative = KvElement::kNative;
  constexpr KvElement kInt8 = KvElement::kInt8;
  constexpr KvElement kFp8 = KvElement::kFp8;
  constexpr KvElement kInt6 = KvElement::kInt6;
  constexpr KvElement kInt4 = KvElement::kInt4;
  switch (kv.key.element) {
    case kInt8:
      return kv.value.element == kInt8  ? quantized_variant<kInt8, kInt8>(kv.row_dim)
             : kv.value.element == kFp8 ? quantized_variant<kInt8, kFp8>(kv.row_dim)
                                        : quantized_variant<kInt8, kInt4>(kv.row_dim);
    case kFp8:
      return quantized_variant<kFp8, kFp8>(kv.row_dim);
    case kInt6:
      return quantized_variant<kInt6, kInt4>(kv.row_dim);
    case kInt4:  // holds no keys
    case kNative:
      break;
  }
  return kv.row_dim == 64    ? variant<kNative, kNative, 64>()
         : kv.row_dim == 128 ? variant<kNative, kNative, 128>()
         : kv.row_dim == 192 ? variant<kNative, kNative, 192>()
                             : variant<kNative, kNative, 256>();
}

}  // namespace
}  // namespace decode

cudaError_t plan_decode(const KvLayout& kv, DecodeLaunch* launch) {
  using namespace decode;
  int device = 0;
  int sms = 0;
  int sm_bytes = 0;
  int block_bytes = 0;
  int reserved = 0;
  int major = 0;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [to, attribute] :
       {std::pair{&sms, cudaDevAttrMultiProcessorCount},
        std::pair{&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        std::pair{&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        std::pair{&reserved, cudaDevAttrReservedSharedMemoryPerBlock},
        std::pair{&major, cudaDevAttrComputeCapabilityMajor}}) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(to, attribute, device);
  }
  if (error != cudaSuccess) return error;

  const Variant variant = variant_of(kv);
  const int two_stages = variant.warps * variant.two_stages;
  const auto stages_of = [&](int blocks) {
    const int bytes = std::min(sm_bytes / blocks - reserved, block_bytes) - variant.fixed_bytes;
    return std::min(bytes / two_stages * 2, kMaxStages);
  };
  const int blocks = stages_of(kBlocks) >= 2 ? kBlocks : 1;
  launch->grid = sms * blocks;
  launch->stages = stages_of(blocks);
  launch->smem_bytes = launch->stages / 2 * two_stages + variant.fixed_bytes;
  launch->merge_grid = sms * 4;
  return cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              launch->smem_bytes);
}

cudaError_t attention_decode(const AttentionArgs& args, const DecodeWork& work,
                             const DecodeLaunch& launch, cudaStream_t stream) {
  const decode::Variant variant = decode::variant_of(args.kv);
  const cudaError_t error = launch_overlapped(variant.kernel, launch.grid, 32 * variant.warps,
                                              launch.smem_bytes, stream, args, work, launch.stages);
  if (error != cudaSuccess) return error;
  return launch_overlapped(decode::merge_kernel, launch.merge_grid, 32 * decode::kMergeWarps, 0,
                           stream, args, work);
}

}  // namespace longspan::cuda
