#include <algorithm>

#include "backend/cuda/attention_decode.h"
#include "backend/cuda/mma.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxStages = 16;
/// Keys that a warp takes at a time: the N of Q K^T and the K of P V.
constexpr int kSlice = 16;
constexpr int kSliceBytes = kSlice * 128;  // of one panel
/// Floats between the rows in which warps exchange a panel's columns: no bank conflicts.
constexpr int kExchangeStride = kPanelCols + 8;

/// Shared memory: stages first, [kWarps][stages][panels][kSlice rows of 128 bytes, swizzled].
template <int kPanels>
struct Fixed {
  uint8_t q[kPanels * kSliceBytes];  // [panels][kDecodePairs rows of 128 bytes, swizzled]
  float exchange[kWarps][kDecodePairs][kExchangeStride];
  float max[kWarps][kDecodePairs];
  float sum[kWarps][kDecodePairs];
  uint64_t landed[kWarps][kMaxStages];
};

/// Unit u of the step's work is span u / num_kv_heads for KV head u % num_kv_heads. Thread block b
/// takes units b, b + gridDim.x, ...; within a span, warp w takes slices w, w + kWarps, ...
struct Units {
  int64_t count;
  int32_t num_kv_heads;

  __device__ int64_t span(int64_t unit) const { return unit / num_kv_heads; }
  __device__ int32_t kv_head(int64_t unit) const {
    return static_cast<int32_t>(unit % num_kv_heads);
  }
};

/// Brings a warp's slices to its ring of stages, in the order in which they are needed, K then V,
/// across the ends of spans: loads stay under way while a span's result is put together.
template <int kPanels>
class SliceLoader {
 public:
  __device__ SliceLoader(const AttentionArgs& args, const DecodeWork& work, const Units& units,
                         int warp, int lane)
      : args_(args), work_(work), units_(units), warp_(warp), lane_(lane), unit_(blockIdx.x) {
    block_shift_ = 31 - __clz(args.kv.block_len);
    enter_span();
  }

  /// Starts the next copy, into a stage that nobody reads any more.
  __device__ void load(uint32_t stage, uint32_t landed) {
    if (unit_ >= units_.count) return;
    if (!value_) {
      const int32_t key = first_key_ + slice_ * kSlice;
      const int32_t in_block = key & (args_.kv.block_len - 1);
      from_ = args_.kv.key_tile(__ldg(table_ + (key >> block_shift_)), args_.layer,
                                units_.kv_head(unit_)) +
              in_block / kPanelTokens * (kPanels * kPanelBytes) + in_block % kPanelTokens * 128;
    }
    const char* from = value_ ? from_ + args_.kv.tile_bytes : from_;
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) {
      mbarrier_arrive_expect(landed, kPanels * kSliceBytes);
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        bulk_copy_once(stage + p * kSliceBytes, from + p * kPanelBytes, kSliceBytes, landed);
      }
    }
#else
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int i = 0; i < kSliceBytes; i += 32 * 16) {
        cp_async(stage + p * kSliceBytes + i + lane_ * 16, from + p * kPanelBytes + i + lane_ * 16);
      }
    }
    cp_async_arrive(landed);
#endif
    value_ = !value_;
    if (value_) return;
    slice_ += kWarps;
    if (slice_ >= num_slices_) {
      unit_ += gridDim.x;
      enter_span();
    }
  }

 private:
  /// Goes to the first slice of this warp in the span of unit_ or a later one.
  __device__ void enter_span() {
    for (; unit_ < units_.count; unit_ += gridDim.x) {
      const DecodeSpan& span = work_.spans[units_.span(unit_)];
      slice_ = warp_;
      num_slices_ = (span.num_keys + kSlice - 1) / kSlice;
      if (slice_ >= num_slices_) continue;
      first_key_ = span.first_key;
      table_ = args_.plan.block_tables + args_.plan.seqs[span.seq].table;
      return;
    }
  }

  const AttentionArgs& args_;
  const DecodeWork& work_;
  const Units units_;
  const int warp_;
  const int lane_;
  int block_shift_;
  int64_t unit_;
  int slice_ = 0;
  int num_slices_ = 0;
  int32_t first_key_ = 0;
  const int32_t* table_ = nullptr;
  const char* from_ = nullptr;
  bool value_ = false;
};

/// Online softmax of a warp over its slices of a span. A lane holds the pairs lane / 4 and
/// lane / 4 + 8; `sum` is of its own keys only.
template <int kPanels>
struct Softmax {
  float out[kPanels * 8][4] = {};  // [n][...] columns 8 n + lane % 4 * 2 + {0, 1}
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  /// Takes the scores of 16 keys, in units of log 2, and leaves their weights as mma's operand A.
  __device__ void weigh(float (&scores)[2][4], uint32_t (&weights)[4]) {
    float rescale[2];
    bool grew = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]),
                      fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
      m = fmaxf(m, __shfl_xor_sync(~0U, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0U, m, 2));
      m = fmaxf(m, max[r]);
      const float base = m == -INFINITY ? 0.0F : m;
      rescale[r] = exp2_approx(max[r] - base);
      grew |= m > max[r];
      max[r] = m;
      float s = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          scores[n][c] = exp2_approx(scores[n][c] - base);
          s += scores[n][c];
        }
      }
      sum[r] = sum[r] * rescale[r] + s;
    }
    if (__any_sync(~0U, grew)) {
#pragma unroll
      for (auto& o : out) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[c] *= rescale[c / 2];
      }
    }
    weights[0] = pack_bf16(scores[0][0], scores[0][1]);
    weights[1] = pack_bf16(scores[0][2], scores[0][3]);
    weights[2] = pack_bf16(scores[1][0], scores[1][1]);
    weights[3] = pack_bf16(scores[1][2], scores[1][3]);
  }
};

/// Operand A of Q K^T for all of head_dim: in registers where there is room, else read again.
template <int kPanels, bool kKept = kPanels <= 2>
class Queries {
 public:
  __device__ Queries(uint32_t q, int lane) {
    address_ = q;
    row_ = lane % 16;
    half_ = lane / 16;
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kPanels * 4; ++k) read(k, kept_[k]);
    }
  }
  __device__ void get(int k, uint32_t (&a)[4]) const {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept_[k][i];
    } else {
      read(k, a);
    }
  }

 private:
  __device__ void read(int k, uint32_t (&a)[4]) const {
    ldmatrix(a, address_ + k / 4 * kSliceBytes + swizzle(row_, k % 4 * 2 + half_));
  }
  uint32_t address_, row_, half_;
  uint32_t kept_[kKept ? kPanels * 4 : 1][4];
};

/// scores[16 pairs][16 keys] = Q K^T.
template <int kPanels>
__device__ void multiply_keys(const Queries<kPanels>& queries, uint32_t keys, int lane,
                              float (&scores)[2][4]) {
  const uint32_t row = lane % 8 + lane / 16 * 8;
  const uint32_t half = lane / 8 % 2;
#pragma unroll
  for (int k = 0; k < kPanels * 4; ++k) {
    uint32_t a[4];
    uint32_t b[4];
    queries.get(k, a);
    ldmatrix(b, keys + k / 4 * kSliceBytes + swizzle(row, k % 4 * 2 + half));
    mma(scores[0], a, b[0], b[1]);
    mma(scores[1], a, b[2], b[3]);
  }
}

/// out[16 pairs][head_dim] += P V.
template <int kPanels>
__device__ void multiply_values(const uint32_t (&weights)[4], uint32_t values, int lane,
                                float (&out)[kPanels * 8][4]) {
  const uint32_t row = lane % 16;
  const uint32_t half = lane / 16;
#pragma unroll
  for (int n = 0; n < kPanels * 4; ++n) {
    uint32_t b[4];
    ldmatrix_trans(b, values + n / 4 * kSliceBytes + swizzle(row, n % 4 * 2 + half));
    mma(out[2 * n], weights, b[0], b[1]);
    mma(out[2 * n + 1], weights, b[2], b[3]);
  }
}

/// Zeroes the rows of a slice of values that hold none: 0 times what stands there need not be 0.
template <int kPanels>
__device__ void zero_rows(uint32_t values, int first, int lane) {
  for (int i = lane; i < kPanels * kSlice * 8; i += 32) {
    const uint32_t address = values + i * 16;
    if (i / 8 % kSlice >= first) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
    }
  }
#if __CUDA_ARCH__ >= 900
  fence_async_proxy();
#endif
  __syncwarp();
}

/// Where pair p of a span is read and written: its row of the step and its query head.
struct PairPlace {
  int64_t row;
  int64_t col;

  __device__ PairPlace(const AttentionArgs& args, const SeqView& seq, int kv_head, int pair) {
    const int group = args.num_heads / args.kv.num_kv_heads;
    row = seq.first_row + pair / group;
    col = int64_t{kv_head * group + pair % group} * args.kv.head_dim;
  }
};

/// Puts the warps' results together and writes them: to out, or normalised to the partial rows.
template <int kPanels>
__device__ void finish_span(const AttentionArgs& args, const DecodeWork& work,
                            const DecodeSpan& span, const SeqView& seq, int kv_head,
                            Softmax<kPanels>& softmax, Fixed<kPanels>& shared) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
    sum += __shfl_xor_sync(~0U, sum, 1);
    sum += __shfl_xor_sync(~0U, sum, 2);
    if (lane % 4 == 0) {
      shared.max[warp][lane / 4 + 8 * r] = softmax.max[r];
      shared.sum[warp][lane / 4 + 8 * r] = sum;
    }
  }
  __syncthreads();

  const auto max_of = [&](int pair) {
    float m = shared.max[0][pair];
    for (int w = 1; w < kWarps; ++w) m = fmaxf(m, shared.max[w][pair]);
    return m;
  };
  float scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float m = max_of(lane / 4 + 8 * r);
    scale[r] = m == -INFINITY ? 0.0F : exp2_approx(softmax.max[r] - m);
  }
  // Now each thread writes 8 columns of one pair per panel.
  const int pair = threadIdx.x / 8;
  const int first_col = threadIdx.x % 8 * 8;
  const float max = max_of(pair);
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (max != -INFINITY) sum += shared.sum[w][pair] * exp2_approx(shared.max[w][pair] - max);
  }
  const float inverse = sum > 0 ? 1.0F / sum : 0.0F;
  const PairPlace place(args, seq, kv_head, span.first_pair + pair);
  const int64_t partial = span.partial + int64_t{kv_head} * span.num_pairs + pair;

#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* o = softmax.out[p * 8 + n] + 2 * r;
        *reinterpret_cast<float2*>(&shared.exchange[warp][lane / 4 + 8 * r][n * 8 + lane % 4 * 2]) =
            make_float2(o[0] * scale[r], o[1] * scale[r]);
      }
    }
    __syncthreads();
    const int col = p * kPanelCols + first_col;
    if (pair < span.num_pairs && col < args.kv.head_dim) {
      float o[8] = {};
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int c = 0; c < 8; ++c) o[c] += shared.exchange[w][pair][first_col + c];
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) o[c] *= inverse;
      if (span.partial < 0) {
        *reinterpret_cast<uint4*>(args.out + place.row * args.out_stride + place.col + col) =
            make_uint4(pack_bf16(o[0], o[1]), pack_bf16(o[2], o[3]), pack_bf16(o[4], o[5]),
                       pack_bf16(o[6], o[7]));
      } else {
        auto* to = reinterpret_cast<float4*>(work.partial_out + partial * args.kv.head_dim + col);
        to[0] = make_float4(o[0], o[1], o[2], o[3]);
        to[1] = make_float4(o[4], o[5], o[6], o[7]);
        if (col == 0) work.partial_lse[partial] = max + log2f(sum);
      }
    }
    __syncthreads();
  }
}

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

  const Units units{int64_t{work.counts->num_spans} * args.kv.num_kv_heads, args.kv.num_kv_heads};
  SliceLoader<kPanels> loader(args, work, units, warp, lane);
  for (int s = 0; s < num_stages; ++s) loader.load(stages + s * kStageBytes, landed + s * 8);
  int stage = 0;
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

  const int group = args.num_heads / args.kv.num_kv_heads;
  for (int64_t unit = blockIdx.x; unit < units.count; unit += gridDim.x) {
    const DecodeSpan span = work.spans[units.span(unit)];
    const SeqView seq = args.plan.seqs[span.seq];
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

constexpr int kMergeWarps = 8;
constexpr int kMaxHeadDim = 256;
static_assert(kMaxDecodeSplits <= 64, "a lane weighs two partial results");

/// One pair at a time: out = sum of 2^(lse_i - max) partial_i over the sum of the weights. Warp w
/// adds partial results w, w + kMergeWarps, ..., and the warps' sums are added in order.
__global__ void __launch_bounds__(32 * kMergeWarps)
    merge_kernel(const __grid_constant__ AttentionArgs args,
                 const __grid_constant__ DecodeWork work) {
  __shared__ __align__(16) float sums[kMergeWarps][kMaxHeadDim];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int head_dim = args.kv.head_dim;
  const int num_kv_heads = args.kv.num_kv_heads;
  const int64_t units = int64_t{work.counts->num_merges} * num_kv_heads;
  for (int64_t u = blockIdx.x; u < units * kDecodePairs; u += gridDim.x) {
    const int pair = static_cast<int>(u / units);
    const int kv_head = static_cast<int>(u % num_kv_heads);
    const DecodeMerge& merge = work.merges[u % units / num_kv_heads];
    if (pair >= merge.num_pairs) continue;
    const int64_t first = merge.partial + int64_t{kv_head} * merge.num_pairs + pair;
    const int64_t step = int64_t{num_kv_heads} * merge.num_pairs;

    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int split = lane + 32 * i;
      weight[i] = split < merge.num_spans ? work.partial_lse[first + split * step] : -INFINITY;
    }
    float max = fmaxf(weight[0], weight[1]);
    for (int i = 16; i > 0; i /= 2) max = fmaxf(max, __shfl_xor_sync(~0U, max, i));
    weight[0] = exp2_approx(weight[0] - max);
    weight[1] = exp2_approx(weight[1] - max);
    float total = weight[0] + weight[1];
    for (int i = 16; i > 0; i /= 2) total += __shfl_xor_sync(~0U, total, i);

    float4 sum[kMaxHeadDim / 128] = {};
#pragma unroll
    for (int i = 0; i < kMaxDecodeSplits / kMergeWarps; ++i) {
      const int split = warp + i * kMergeWarps;
      const float w = __shfl_sync(~0U, weight[i * kMergeWarps / 32], split % 32);
      if (split >= merge.num_spans) continue;
      const float* from = work.partial_out + (first + split * step) * head_dim;
#pragma unroll
      for (int j = 0; j < kMaxHeadDim / 128; ++j) {
        const int col = j * 128 + lane * 4;
        if (col >= head_dim) continue;
        const float4 x = *reinterpret_cast<const float4*>(from + col);
        sum[j].x += w * x.x;
        sum[j].y += w * x.y;
        sum[j].z += w * x.z;
        sum[j].w += w * x.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 128; ++j) {
      *reinterpret_cast<float4*>(&sums[warp][j * 128 + lane * 4]) = sum[j];
    }
    __syncthreads();
    const SeqView& seq = args.plan.seqs[merge.seq];
    const PairPlace place(args, seq, kv_head, merge.first_pair + pair);
    for (int col = threadIdx.x * 2; col < head_dim; col += 2 * 32 * kMergeWarps) {
      float2 x = {};
      for (int w = 0; w < kMergeWarps; ++w) {
        x.x += sums[w][col];
        x.y += sums[w][col + 1];
      }
      *reinterpret_cast<uint32_t*>(args.out + place.row * args.out_stride + place.col + col) =
          pack_bf16(x.x / total, x.y / total);
    }
    __syncthreads();
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

cudaError_t plan_decode(int32_t head_dim, DecodeLaunch* launch) {
  int device = 0;
  int sms = 0;
  int sm_bytes = 0;
  int block_bytes = 0;
  int reserved = 0;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [to, attribute] :
       {std::pair{&sms, cudaDevAttrMultiProcessorCount},
        std::pair{&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        std::pair{&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        std::pair{&reserved, cudaDevAttrReservedSharedMemoryPerBlock}}) {
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
  kernel_of(args.kv.panels_per_token)<<<launch.grid, kThreads, launch.smem_bytes, stream>>>(
      args, work, launch.stages);
  merge_kernel<<<launch.merge_grid, 32 * kMergeWarps, 0, stream>>>(args, work);
  return cudaGetLastError();
}

}  // namespace longspan::cuda
