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

template <int kPanels>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const __grid_constant__ AttentionArgs args,
                  const __grid_constant__ DecodeWork work, int num_stages) {
  extern __shared__ __align__(1024) uint8_t smem[];
  constexpr uint32_t kStageBytes = kPanels * kSliceBytes;
  auto& shared = *reinterpret_cast<Fixed<kPanels>*>(smem + kWarps * num_stages * kStageBytes);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t stages = smem_address(smem) + warp * num_stages * kStageBytes;
  const uint32_t landed = smem_address(shared.landed[warp]);
#if __CUDA_ARCH__ >= 900
  const uint32_t arrivals = 1;
#else
  const uint32_t arrivals = 32;
#endif
  if (lane < num_stages) mbarrier_init(landed + lane * 8, arrivals);
#if __CUDA_ARCH__ >= 900
  fence_async_proxy();
#endif
  __syncwarp();

  // The plan was there before the step began, and so were all keys but the step's own.
  const Units units{work.counts->num_spans * args.kv.num_kv_heads, args.kv.num_kv_heads};
  SliceLoader<kPanels> loader(args, work, units, warp, lane);
  int stage = 0;
  for (; stage < num_stages && loader.next_is_old(); ++stage) {
    loader.load(stages + stage * kStageBytes, landed + stage * 8);
  }
  wait_for_previous_kernel();
  for (; stage < num_stages; ++stage) {
    loader.load(stages + stage * kStageBytes, landed + stage * 8);
  }
  stage = 0;
  uint32_t parity = 0;
  const auto wait = [&] {
    mbarrier_wait(landed + stage * 8, parity);
    __syncwarp();
    return stages + stage * kStageBytes;
  };
  const auto release = [&] {
    __syncwarp();
    loader.load(stages + stage * kStageBytes, landed + stage * 8);
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
    for (int i = threadIdx.x; i < kDecodePairs * kPanels * 8; i += kThreads) {
      const int pair = i / (kPanels * 8);
      const int chunk = i % (kPanels * 8);
      uint4 q = make_uint4(0, 0, 0, 0);
      if (pair < span.num_pairs && chunk * 8 < args.kv.head_dim) {
        const PairPlace place(args, seq, kv_head, span.first_pair + pair);
        q = *reinterpret_cast<const uint4*>(args.q + place.row * args.q_stride + place.col +
                                            chunk * 8);
      }
      *reinterpret_cast<uint4*>(shared.q + chunk / 8 * kSliceBytes + swizzle(pair, chunk % 8)) = q;
    }
    __syncthreads();
    const Queries<kPanels> queries(smem_address(shared.q), lane);

    // Keys of the span that the lane's two pairs see, and those that every pair sees.
    const auto visible = [&](int pair) {
      const int64_t last = seq.first_position + (span.first_pair + pair) / group;
      return static_cast<int>(
          max(int64_t{0}, min(int64_t{span.num_keys}, last + 1 - span.first_key)));
    };
    const int visible_here[2] = {visible(min(lane / 4, span.num_pairs - 1)),
                                 visible(min(lane / 4 + 8, span.num_pairs - 1))};
    const int visible_to_all = visible(0);

    read_ahead(unit + gridDim.x);
    Softmax<kPanels> softmax;
    for (int key = warp * kSlice; key < span.num_keys; key += kWarps * kSlice) {
      float scores[2][4] = {};
      multiply_keys(queries, wait(), lane, scores);
      release();
#pragma unroll
      for (auto& s : scores) {
#pragma unroll
        for (float& x : s) x *= seq.scale_log2;
      }
      if (key + kSlice > visible_to_all) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (key + n * 8 + lane % 4 * 2 + c % 2 >= visible_here[c / 2]) {
              scores[n][c] = -INFINITY;
            }
          }
        }
      }
      uint32_t weights[4];
      softmax.weigh(scores, weights);
      const uint32_t values = wait();
      if (key + kSlice > span.num_keys) zero_rows<kPanels>(values, span.num_keys - key, lane);
      multiply_values<kPanels>(weights, values, lane, softmax.out);
      release();
    }
    finish_span(args, work, span, seq, kv_head, softmax, shared);
  }
}

using Kernel = void (*)(AttentionArgs, DecodeWork, int);

Kernel kernel_of(int panels) {
  constexpr Kernel kKernels[] = {decode_kernel<1>, decode_kernel<2>, decode_kernel<3>,
                                 decode_kernel<4>};
  return kKernels[panels - 1];
}

int fixed_bytes(int panels) {
  constexpr int kBytes[] = {sizeof(Fixed<1>), sizeof(Fixed<2>), sizeof(Fixed<3>), sizeof(Fixed<4>)};
  return kBytes[panels - 1];
}

}  // namespace
}  // namespace decode

cudaError_t plan_decode(int32_t head_dim, DecodeLaunch* launch) {
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

  const int panels = (head_dim + kPanelCols - 1) / kPanelCols;
  const int stage_bytes = kWarps * panels * kSliceBytes;
  const auto stages_of = [&](int blocks) {
    const int bytes = std::min(sm_bytes / blocks - reserved, block_bytes) - fixed_bytes(panels);
    return std::min(bytes / stage_bytes, kMaxStages);
  };
  // Two thread blocks hide the ends of each other's spans, where they leave room for enough stages.
  const int blocks = stages_of(2) >= 4 ? 2 : 1;
  launch->grid = sms * blocks;
  launch->stages = stages_of(blocks);
  launch->smem_bytes = launch->stages * stage_bytes + fixed_bytes(panels);
  launch->merge_grid = sms * 4;
  return cudaFuncSetAttribute(kernel_of(panels), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              launch->smem_bytes);
}

cudaError_t attention_decode(const AttentionArgs& args, const DecodeWork& work,
                             const DecodeLaunch& launch, cudaStream_t stream) {
  const cudaError_t error =
      launch_overlapped(decode::kernel_of(args.kv.panels_per_token), launch.grid, decode::kThreads,
                        launch.smem_bytes, stream, args, work, launch.stages);
  if (error != cudaSuccess) return error;
  return launch_overlapped(decode::merge_kernel, launch.merge_grid, 32 * decode::kMergeWarps, 0,
                           stream, args, work);
}

}  // namespace longspan::cuda
