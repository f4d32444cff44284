#include "backend/cuda/attention_prefill_int8_sm90.h"
#include "backend/cuda/int8_rows.cuh"
#include "backend/cuda/prefill_sm90.cuh"

namespace longspan::cuda {
namespace {

struct Shape : PrefillShape<128> {
  static constexpr int kKeySlots = 4;
  static constexpr int kValueSlots = 3;
  static constexpr int kKeyBytes = kKeys * kHeadDim;
  static constexpr int kValueBytes = kKeys * kHeadDim * 2;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
};

/// Shared memory. A slot holds a step's keys, [kKeys][128] bytes, and the scales of their panels,
/// or its values, [kPanels][kKeys][64] bfloat16, in the 128-byte swizzle. Both sides go through the
/// slots in the same order, a tile's last step first.
struct Shared {
  alignas(1024) char keys[Shape::kKeySlots][Shape::kKeyBytes];
  alignas(1024) char values[Shape::kValueSlots][Shape::kValueBytes];
  alignas(1024) QueryBuffers<Shape> queries;
  float key_scales[Shape::kKeySlots][2];
  QueryTurns<Shape> query_turns;
  uint64_t keys_full[Shape::kKeySlots];
  uint64_t keys_empty[Shape::kKeySlots];
  uint64_t values_full[Shape::kValueSlots];
  uint64_t values_empty[Shape::kValueSlots];
};
static_assert(sizeof(Shared) <= 227 * 1024);

/// Half of each slot, the first or the second 64 keys, comes from either thread block and goes to
/// both. The values of a step follow the keys of the step after it, as they are needed.
__device__ void bring_keys_values(const AttentionArgs& args, const Int8Keys& source,
                                  const PrefillWorkSm90& work, Shared& shared, int rank) {
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  const int lane = threadIdx.x % 32;
  const KvLayout& kv = args.kv;
  const int block_panels = kv.block_len / kPanelTokens;
  const int block_shift = block_panels / 2;  // 1, 2, 4 panels: 0, 1, 2
  Turn<Shape::kKeySlots> key_turn;
  Turn<Shape::kValueSlots> value_turn;
  const auto bring_keys = [&](const char* from, float2 scales) {
    mbarrier_wait_amid(smem_address(&shared.keys_empty[key_turn.slot]), key_turn.parity ^ 1);
    if (lane == 0) {
      const uint32_t full = smem_address(&shared.keys_full[key_turn.slot]);
      shared.key_scales[key_turn.slot][0] = scales.x;
      shared.key_scales[key_turn.slot][1] = scales.y;
      mbarrier_arrive_expect(full, Shape::kKeyBytes);
      bulk_copy_multicast(smem_address(shared.keys[key_turn.slot]) + rank * kPanelBytes, from,
                          kPanelBytes, full, kAll);
    }
    __syncwarp();
    key_turn.next();
  };
  const auto bring_values = [&](const char* from) {
    mbarrier_wait_amid(smem_address(&shared.values_empty[value_turn.slot]), value_turn.parity ^ 1);
    if (lane == 0) {
      const uint32_t full = smem_address(&shared.values_full[value_turn.slot]);
      const uint32_t to = smem_address(shared.values[value_turn.slot]) + rank * kPanelBytes;
      mbarrier_arrive_expect(full, Shape::kValueBytes);
#pragma unroll
      for (int i = 0; i < Shape::kPanels; ++i) {
        bulk_copy_multicast(to + i * (2 * kPanelBytes), from + i * kPanelBytes, kPanelBytes, full,
                            kAll);
      }
    }
    __syncwarp();
    value_turn.next();
  };

  const int cluster = blockIdx.x / kCluster;
  const int end = work.first[cluster + 1];
  for (int t = work.first[cluster]; t < end; ++t) {
    const Tile tile = tile_of<Shape>(args, work.tiles[t], rank);
    const int32_t* table = args.plan.block_tables + tile.seq.table;
    const int kv_head = tile.head / (args.num_heads / kv.num_kv_heads);
    const char* base = kv.key_tile(0, args.layer, kv_head) + kv.value.offset;
    const int last_panel = (tile.num_keys - 1) / kPanelTokens;
    const int last_step = last_panel / 2;
    const int64_t first_panel =
        int64_t{kv_head} * source.num_panels + source.seqs[work.tiles[t].seq].table;
    const char* keys = source.panels + first_panel * kPanelBytes;
    const float* key_scales = source.scales + first_panel;
    // Lane l looks up the block and the scales of step 32 group + l, one group ahead. Beyond the
    // last panel it is read again: all that is needed there is finite values.
    const auto panel_of = [&](int group, int half) {
      return max(0, min((group * 32 + lane) * 2 + half, last_panel));
    };
    const auto scales_of = [&](int group) {
      return make_float2(key_scales[panel_of(group, 0)], key_scales[panel_of(group, 1)]);
    };
    int group = last_step / 32;
    int block = table[panel_of(group, rank) >> block_shift];
    float2 next_scales = scales_of(group);
    float2 scales{};
    const char* at = nullptr;
    const char* values = nullptr;
    for (int step = last_step; step >= 0; --step) {
      if (step == last_step || step % 32 == 31) {
        at = base + block * kv.block_bytes +
             (panel_of(group, rank) & (block_panels - 1)) * (Shape::kPanels * kPanelBytes);
        scales = next_scales;
        --group;
        block = table[panel_of(group, rank) >> block_shift];
        next_scales = scales_of(group);
      }
      bring_keys(keys + int64_t{min(step * 2 + rank, last_panel)} * kPanelBytes,
                 {__shfl_sync(0xffffffffU, scales.x, step % 32),
                  __shfl_sync(0xffffffffU, scales.y, step % 32)});
      if (step < last_step) bring_values(values);
      values = reinterpret_cast<const char*>(
          __shfl_sync(0xffffffffU, reinterpret_cast<uint64_t>(at), step % 32));
    }
    bring_values(values);
  }
}

/// A consumer's queries in eight bits as the left operand of a product, in registers.
class Queries {
 public:
  __device__ explicit Queries(const char* at) {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Of each 16 elements, this lane's four.
      float four[kSixteens][4];
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        const int chunk = 2 * i + lane % 4 / 2;
        const auto bits = *reinterpret_cast<const uint2*>(
            at + chunk / 8 * kPanelBytes + swizzle(row + 8 * h, chunk % 8) + lane % 2 * 8);
        four[i][0] = __uint_as_float(bits.x << 16);
        four[i][1] = __uint_as_float(bits.x & 0xffff0000U);
        four[i][2] = __uint_as_float(bits.y << 16);
        four[i][3] = __uint_as_float(bits.y & 0xffff0000U);
#pragma unroll
        for (const float x : four[i]) largest = fmaxf(largest, fabsf(x));
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 2));
      const Int8Scale by = int8_scale(largest);
      scale_[h] = by.scale;
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        q_[i / 2][i % 2 * 2 + h] =
            to_int8(four[i][0], four[i][1], four[i][2], four[i][3], by.inverse);
      }
    }
  }

  /// Of the lane's row h.
  __device__ float scale(int h) const { return scale_[h]; }

  /// sums += q k^T of a panel of keys.
  __device__ void multiply(int32_t (&sums)[kPanelTokens / 2], uint64_t k) const {
#pragma unroll
    for (int i = 0; i < Shape::kHeadDim / 32; ++i)
      wgmma_int8(sums, q_[i], wgmma_advance(k, 32 * i));
  }

 private:
  static constexpr int kSixteens = Shape::kHeadDim / 16;
  uint32_t q_[kSixteens / 2][4];
  float scale_[2];
};

/// Scores of a panel of keys before their scales, as sums in integers. They begin at the bits of
/// the float 1.5 * 2^23, so that as bits of a float they are 1.5 * 2^23 + q k^T: no sum reaches
/// 2^22. That float is greater where its bits are, as integers, minus infinity included.
using Sums = int32_t[kPanelTokens / 2];
constexpr float kSumsBegin = 0x1.8p23f;
static_assert(127 * 127 * Shape::kHeadDim < 1 << 22);

/// Sums of keys that a row does not see become minus infinity: see mask_scores.
__device__ inline void mask_sums(Sums& sums, int limit, int last) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int most = min(limit + 8 * h, last) - column;
#pragma unroll
    for (int j = 0; j < kPanelTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + i > most) sums[4 * j + 2 * h + i] = __float_as_int(-INFINITY);
      }
    }
  }
}

/// The weights of sums, rounded to bfloat16, which makes them left operands of wgmma_rs: see
/// softmax_step. scale_log2: of the rows, the keys' included; state.max is that of scaled scores.
template <bool kMasked>
__device__ inline void weigh(const Sums& sums, RunningSoftmax& state, const float (&scale_log2)[2],
                             float (&factor)[2], uint32_t (&p)[kPanelTokens / 16][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int32_t most[2] = {max(sums[2 * h], sums[2 * h + 1]), max(sums[4 + 2 * h], sums[5 + 2 * h])};
#pragma unroll
    for (int j = 2; j < kPanelTokens / 8; ++j) {
      most[j % 2] = __vimax3_s32(most[j % 2], sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
    }
    const float old = state.max[h];
    float max = (__int_as_float(::max(most[0], most[1])) - kSumsBegin) * scale_log2[h];
    max = fmaxf(max, __shfl_xor_sync(0xffffffffU, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffU, max, 2));
    max = max - old > kSlackLog2 ? max : old;  // old while both are minus infinity
    factor[h] = max == old ? 1.0f : exp2_approx(old - max);
    state.max[h] = max;
    // A row may have seen no key yet.
    const float base = kMasked && max == -INFINITY ? 0.0f : max;
    const float offset = fmaf(-kSumsBegin, scale_log2[h], -base);
    float sum[4] = {};
#pragma unroll
    for (int j = 0; j < kPanelTokens / 8; ++j) {
      float w[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        w[i] = exp2_approx(fmaf(__int_as_float(sums[4 * j + 2 * h + i]), scale_log2[h], offset));
        sum[j % 2 * 2 + i] += w[i];
      }
      p[j / 2][j % 2 * 2 + h] = pack_bf16(w[0], w[1]);
    }
    state.sum[h] = fmaf(state.sum[h], factor[h], (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

__device__ void compute(const AttentionArgs& args, Shared& shared, int consumer) {
  const int lane = threadIdx.x % 32;
  const int thread_row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  Turn<Shape::kKeySlots> key_turn;
  Turn<Shape::kValueSlots> value_turn;
  const auto wait_keys = [&] {
    mbarrier_wait_amid(smem_address(&shared.keys_full[key_turn.slot]), key_turn.parity);
  };
  const auto wait_values = [&](const Turn<Shape::kValueSlots>& turn) {
    mbarrier_wait_amid(smem_address(&shared.values_full[turn.slot]), turn.parity);
  };
  const uint32_t keys_empty = cluster_address(smem_address(shared.keys_empty), lane % kCluster);
  const uint32_t values_empty = cluster_address(smem_address(shared.values_empty), lane % kCluster);
  const auto release = [&](uint32_t empty, int slot) {
    if (lane < kCluster) mbarrier_arrive_cluster(empty + slot * sizeof(uint64_t));
  };

  for (int t = 0;; ++t) {
    const int buffer = t % 2;
    mbarrier_wait_amid(smem_address(&shared.query_turns.full[buffer][consumer]), t / 2 % 2);
    const Rows rows = shared.query_turns.rows[buffer][consumer];
    if (rows.num_steps == 0) return;
    const Queries q(shared.queries[buffer][consumer]);

    // Of the panels 0 and 1 of a step.
    Sums sums[2];
    uint32_t p[2][kPanelTokens / 16][4];
    float key_scales[2] = {};

    float o[Shape::kHeadDim / 2] = {};
    float factor[2];
    RunningSoftmax softmax;
    int step = rows.num_steps - 1;
    int key_slot = 0;
    Turn<Shape::kValueSlots> values;  // the slot in use
    const auto multiply_keys = [&](int panel) {
      q.multiply(sums[panel],
                 wgmma_operand(smem_address(shared.keys[key_slot]) + panel * kPanelBytes));
      wgmma_commit();
    };
    const auto multiply_values = [&](int panel) {
      const uint64_t v = wgmma_operand(smem_address(shared.values[values.slot]), 2 * kPanelBytes);
#pragma unroll
      for (int i = 0; i < kPanelTokens / 16; ++i) {
        wgmma_rs<true, true>(o, p[panel][i], wgmma_advance(v, panel * kPanelBytes + i * 16 * 128));
      }
      wgmma_commit();
    };
    const auto begin = [&](int panel) {
#pragma unroll
      for (int32_t& sum : sums[panel]) sum = __float_as_int(kSumsBegin);
      pin(sums[panel]);
    };
    const auto weigh_panel = [&]<bool kMasked>(int panel) {
      const float by = key_scales[panel] * rows.scale_log2;
      const float scale_log2[2] = {by * q.scale(0), by * q.scale(1)};
      if (kMasked) {
        const int first_key = step * kKeys + panel * kPanelTokens;
        mask_sums(sums[panel], rows.first_sees + thread_row - first_key, rows.last_key - first_key);
      }
      weigh<kMasked>(sums[panel], softmax, scale_log2, factor, p[panel]);
      pin(p[panel]);
      begin(panel);
    };
    const auto next_keys = [&] {
      wait_keys();
      key_slot = key_turn.next();
      key_scales[1] = shared.key_scales[key_slot][1];
    };

    // The scores of a panel are turned into weights while those of the panel before it are formed,
    // and the values of the panel after it are added up.
    const auto upper = [&]<bool kMasked, bool kFirst>() {
      key_scales[0] = shared.key_scales[key_slot][0];
      pin(sums[0]);
      pin(o);
      pin(p[0]);
      wgmma_fence();
      multiply_keys(0);
      if (!kFirst) multiply_values(0);
      weigh_panel.template operator()<kMasked>(1);
      // Here because it is a branch: see attention_prefill_sm90.cu.
      wait_values(value_turn);
      wgmma_wait<0>();
      pin(sums[0]);
      pin(o);
      release(keys_empty, key_slot);
      if (!kFirst) release(values_empty, values.slot);
      values = value_turn;
      value_turn.next();
      rescale(o, factor);
    };
    const auto lower = [&]<bool kMasked>() {
      next_keys();
      pin(sums[1]);
      pin(o);
      pin(p[1]);
      wgmma_fence();
      multiply_keys(1);
      multiply_values(1);
      weigh_panel.template operator()<kMasked>(0);
      wait_values(values);  // for the branch
      wgmma_wait<0>();
      pin(sums[1]);
      pin(o);
      rescale(o, factor);
    };

    next_keys();
    begin(0);
    begin(1);
    wgmma_fence();
    multiply_keys(1);
    wgmma_wait<0>();
    pin(sums[1]);
    upper.template operator()<true, true>();
    const int num_unmasked = (rows.first_sees + 1) / kKeys;
    for (; step > 0 && step >= num_unmasked;) {
      lower.template operator()<true>();
      --step;
      upper.template operator()<true, false>();
    }
    for (; step > 0;) {
      lower.template operator()<false>();
      --step;
      upper.template operator()<false, false>();
    }
    pin(o);
    pin(p[1]);
    wgmma_fence();
    multiply_values(1);
    weigh_panel.template operator()<true>(0);
    wait_values(values);
    wgmma_wait<0>();
    pin(o);
    rescale(o, factor);
    pin(o);
    pin(p[0]);
    wgmma_fence();
    multiply_values(0);
    wgmma_wait<0>();
    pin(o);
    release(values_empty, values.slot);

    float inverse[2];
    invert_sums(softmax, inverse);
    named_barrier_sync(1 + consumer, kWarpgroup);  // no warp of it reads the queries any more
    write_rows<Shape>(args, rows, o, inverse, shared.queries[buffer][consumer]);
    mbarrier_arrive(smem_address(&shared.query_turns.empty[buffer][consumer]));
  }
}

__global__ void __launch_bounds__(Shape::kThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionArgs args,
                   const __grid_constant__ Int8Keys keys,
                   const __grid_constant__ PrefillWorkSm90 work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // empty in code for other cards
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const auto rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    constexpr int kReleases = kCluster * Shape::kConsumers * 4;  // a warp's, to either thread block
    for (int i = 0; i < Shape::kKeySlots; ++i) {
      mbarrier_init(smem_address(&shared.keys_full[i]), 1);
      mbarrier_init(smem_address(&shared.keys_empty[i]), kReleases);
    }
    for (int i = 0; i < Shape::kValueSlots; ++i) {
      mbarrier_init(smem_address(&shared.values_full[i]), 1);
      mbarrier_init(smem_address(&shared.values_empty[i]), kReleases);
    }
    shared.query_turns.init();
    fence_mbarrier_init();
  }
  cluster_sync();

  // The same in all lanes, which the compiler is to know.
  const auto warp = static_cast<int>(__shfl_sync(0xffffffffU, threadIdx.x / 32, 0));
  if (warp < 4) {
    give_registers<Shape::kProducerRegisters>();
    if (warp == 0) {
      bring_keys_values(args, keys, work, shared, rank);
    } else if (warp <= Shape::kConsumers) {
      bring_queries<Shape>(args, work, shared.queries, shared.query_turns, rank, warp - 1);
    }
  } else {
    take_registers<Shape::kConsumerRegisters>();
    compute(args, shared, warp / 4 - 1);
  }
  cluster_sync();  // neither thread block ends while the other may write to it
#endif
}

}  // namespace

cudaError_t prepare_prefill_int8_sm90() {
  return cudaFuncSetAttribute(prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(sizeof(Shared)));
}

cudaError_t attention_prefill_int8_sm90(const AttentionArgs& args, const Int8Keys& keys,
                                        const PrefillWorkSm90& work, cudaStream_t stream) {
  return launch_clusters(prefill_kernel, work.num_clusters, Shape::kThreads, sizeof(Shared), stream,
                         args, keys, work);
}

}  // namespace longspan::cuda
