#include "backend/cuda/attention_prefill_int8_fp8_sm90.h"
#include "backend/cuda/prefill_fp8_softmax.cuh"
#include "backend/cuda/prefill_sm90.cuh"

namespace longspan::cuda {
namespace {

struct Shape : PrefillShape<128> {
  static constexpr int kKeySlots = 4;
  static constexpr int kValueSlots = 4;
  static constexpr int kKeyBytes = kKeys * kHeadDim;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
};

/// A panel of transposed values, and behind it 8 rows of ones, whose products are the sums of
/// weights. Half of head_dim is multiplied at a time, the ones with the second.
struct ValuePanel {
  char rows[kPanelBytes];
  char ones[8 * kPanelTokens];
};
constexpr uint32_t kHalfBytes = kPanelBytes / 2;
constexpr uint32_t kOnes = 0x38383838;  // four in e4m3

/// Shared memory. A slot holds a step's keys, [kKeys][128] bytes in the 128-byte swizzle, or its
/// values, in the 64-byte swizzle, and what they are multiplied by. Both sides go through the slots
/// in the same order, a tile's last step first.
struct Shared {
  alignas(1024) char keys[Shape::kKeySlots][Shape::kKeyBytes];
  alignas(1024) QueryBuffers<Shape> queries;
  alignas(1024) ValuePanel values[Shape::kValueSlots][2];
  float key_scales[Shape::kKeySlots][2];
  float value_scales[Shape::kValueSlots];
  QueryTurns<Shape> query_turns;
  uint64_t keys_full[Shape::kKeySlots];
  uint64_t keys_empty[Shape::kKeySlots];
  uint64_t values_full[Shape::kValueSlots];
  uint64_t values_empty[Shape::kValueSlots];
};
static_assert(sizeof(ValuePanel) % 512 == 0);
static_assert(sizeof(Shared) <= 227 * 1024);

/// Either thread block brings a panel of each step, the first or the second, and both get it. The
/// values of a step follow the keys of the step after it, as they are needed.
__device__ void bring_keys_values(const AttentionArgs& args, const Int8Keys& keys,
                                  const Fp8Values& values, const PrefillWorkSm90& work,
                                  Shared& shared, int rank) {
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  const int lane = threadIdx.x % 32;
  Turn<Shape::kKeySlots> key_turn;
  Turn<Shape::kValueSlots> value_turn;
  const int cluster = blockIdx.x / kCluster;
  const int end = work.first[cluster + 1];
  for (int t = work.first[cluster]; t < end; ++t) {
    const Tile tile = tile_of<Shape>(args, work.tiles[t], rank);
    const int kv_head = tile.head / (args.num_heads / args.kv.num_kv_heads);
    const int last_panel = (tile.num_keys - 1) / kPanelTokens;
    const int last_step = last_panel / 2;
    const int64_t first_panel =
        int64_t{kv_head} * keys.num_panels + keys.seqs[work.tiles[t].seq].table;
    const char* key_panels = keys.panels + first_panel * kPanelBytes;
    const char* value_panels = values.panels + first_panel * kPanelBytes;
    // Beyond the last panel it is read again: all that is needed there is finite numbers.
    const auto panel_of = [&](int step, int half) { return min(step * 2 + half, last_panel); };
    // Lane l looks up the scales of step 32 group + l, one group ahead.
    struct Scales {
      float key[2];
      float value;
    };
    const auto scales_of = [&](int group) {
      const int step = max(0, group * 32 + lane);
      const int low = panel_of(step, 0);
      return Scales{{keys.scales[first_panel + low].scale,
                     keys.scales[first_panel + panel_of(step, 1)].scale},
                    values.scales[first_panel + low]};
    };
    const auto bring_keys = [&](int step, float low, float high) {
      mbarrier_wait_amid(smem_address(&shared.keys_empty[key_turn.slot]), key_turn.parity ^ 1);
      if (lane == 0) {
        const uint32_t full = smem_address(&shared.keys_full[key_turn.slot]);
        mbarrier_arrive_expect(full, Shape::kKeyBytes + sizeof(float2));
        store_async(smem_address(shared.key_scales[key_turn.slot]), float2{low, high}, full);
        bulk_copy_multicast(smem_address(shared.keys[key_turn.slot]) + rank * kPanelBytes,
                            key_panels + int64_t{panel_of(step, rank)} * kPanelBytes, kPanelBytes,
                            full, kAll);
      }
      __syncwarp();
      key_turn.next();
    };
    const auto bring_values = [&](int step, float scale) {
      mbarrier_wait_amid(smem_address(&shared.values_empty[value_turn.slot]),
                         value_turn.parity ^ 1);
      if (lane == 0) {
        const uint32_t full = smem_address(&shared.values_full[value_turn.slot]);
        mbarrier_arrive_expect(full, 2 * kPanelBytes + sizeof(float));
        store_async(smem_address(&shared.value_scales[value_turn.slot]), scale, full);
        bulk_copy_multicast(smem_address(shared.values[value_turn.slot][rank].rows),
                            value_panels + int64_t{panel_of(step, rank)} * kPanelBytes, kPanelBytes,
                            full, kAll);
      }
      __syncwarp();
      value_turn.next();
    };
    int group = last_step / 32;
    Scales next = scales_of(group);
    Scales now{};
    float value_scale = 0.0f;
    for (int step = last_step; step >= 0; --step) {
      if (step == last_step || step % 32 == 31) {
        now = next;
        next = scales_of(--group);
      }
      bring_keys(step, __shfl_sync(0xffffffffU, now.key[0], step % 32),
                 __shfl_sync(0xffffffffU, now.key[1], step % 32));
      if (step < last_step) bring_values(step + 1, value_scale);
      value_scale = __shfl_sync(0xffffffffU, now.value, step % 32);
    }
    bring_values(0, value_scale);
  }
}

/// What a thread has summed up of its two rows, in float32. Tensor cores add up a step only, half
/// of head_dim at a time.
class Fp8Totals {
 public:
  /// Begins to add up a half of the products of a step's weights and values: a group of wgmma.
  template <int kHalf>
  __device__ void multiply(const Fp8Weights& p, const ValuePanel (&values)[2]) {
    const uint64_t all = wgmma_operand_64(smem_address(values));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      const uint64_t v =
          wgmma_advance(all, i / 2 * sizeof(ValuePanel) + kHalf * kHalfBytes + i % 2 * 32);
      if constexpr (kHalf == 0) {
        i == 0 ? wgmma_fp8<false>(part_, p[i], v) : wgmma_fp8<true>(part_, p[i], v);
      } else {
        i == 0 ? wgmma_fp8<false>(part_, weights_, p[i], v)
               : wgmma_fp8<true>(part_, weights_, p[i], v);
      }
    }
    wgmma_commit();
  }

  /// Of the step whose halves are added up next: what its values are multiplied by.
  __device__ void begin_step(float scale) {
    scale_ = scale;
    factor_[0] = factor_[1] = 1.0f;
  }

  /// After wgmma_wait, adds the half up.
  template <int kHalf>
  __device__ void add() {
    pin(part_);
    const float by[2] = {scale_ * factor_[0], scale_ * factor_[1]};
#pragma unroll
    for (int i = 0; i < kHalfCount; ++i) {
      float& to = out_[kHalf * kHalfCount + i];
      to = fmaf(part_[i], by[i / 2 % 2], to);
    }
    if constexpr (kHalf == 1) {
      pin(weights_);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        weight_sum_[h] = fmaf(weights_[2 * h], factor_[h], weight_sum_[h]);
    }
  }

  /// Multiplies what was added up, and what the tensor cores are at, by the factors of move_bases.
  __device__ void rescale(const float (&factor)[2]) {
    cuda::rescale(out_, factor);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      weight_sum_[h] *= factor[h];
      factor_[h] *= factor[h];
    }
  }

  __device__ const float (&out() const)[Shape::kHeadDim / 2] { return out_; }
  __device__ float weight_sum(int h) const { return weight_sum_[h]; }

 private:
  static constexpr int kHalfCount = Shape::kHeadDim / 4;
  float out_[Shape::kHeadDim / 2] = {};
  float weight_sum_[2] = {};
  float part_[kHalfCount];
  float weights_[4];                // of the part: each row's sum, in two columns
  float scale_;                     // of the part
  float factor_[2] = {1.0f, 1.0f};  // of the part's rows, whose base may have moved since
};

__device__ void compute(const AttentionArgs& args, Shared& shared, int consumer) {
  const int lane = threadIdx.x % 32;
  const int thread_row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  Turn<Shape::kKeySlots> key_turn;
  Turn<Shape::kValueSlots> value_turn;
  const auto next_keys = [&] {
    mbarrier_wait_amid(smem_address(&shared.keys_full[key_turn.slot]), key_turn.parity);
    return key_turn.next();
  };
  const auto next_values = [&] {
    mbarrier_wait_amid(smem_address(&shared.values_full[value_turn.slot]), value_turn.parity);
    return value_turn.next();
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
    if (rows.num_keys == 0) return;
    // In eight bits they take the place of the warp's own rows.
    const Int8Queries q(shared.queries[buffer][consumer]);
    __syncwarp();
    q.store(shared.queries[buffer][consumer]);
    fence_async_proxy();
    named_barrier_sync(1 + consumer, kWarpgroup);
    const uint64_t queries = wgmma_operand(smem_address(shared.queries[buffer][consumer]));

    Int8Sums sums[2];  // of a step's panels
    Fp8Weights p;
    Fp8Softmax softmax;
    Fp8Totals totals;
    int step = rows.num_steps() - 1;

    const auto multiply_keys = [&](int slot) {
      const uint64_t keys = wgmma_operand(smem_address(shared.keys[slot]));
      begin_sums(sums[0]);
      begin_sums(sums[1]);
      pin(sums[0]);
      pin(sums[1]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < Shape::kHeadDim / 32; ++i) {
        wgmma_int8(sums[0], sums[1], wgmma_advance(queries, 32 * i), wgmma_advance(keys, 32 * i));
      }
      wgmma_commit();
    };
    const auto begin_step = [&](int key_slot) {
      const float scale[2] = {shared.key_scales[key_slot][0], shared.key_scales[key_slot][1]};
      if (softmax.begin_step(sums, scale, q, rows.scale_log2)) {
        float factor[2];
        softmax.move_bases(sums, factor);
        totals.rescale(factor);
      }
      release(keys_empty, key_slot);  // the vote says that all lanes have read the scales
    };
    const auto take_values = [&] {
      const int slot = next_values();
      totals.begin_step(shared.value_scales[slot]);
      return slot;
    };
    const auto add_values = [&] {
      const int slot = take_values();
      pin(p);
      totals.multiply<0>(p, shared.values[slot]);
      wgmma_wait<0>();
      totals.add<0>();
      totals.multiply<1>(p, shared.values[slot]);
      wgmma_wait<0>();
      totals.add<1>();
      release(values_empty, slot);
    };
    // Steps with keys that some rows do not see. p has the weights of the step before, whose values
    // are still to be added up.
    const int num_unmasked = min(rows.position + 1, rows.num_keys) / kKeys;
    do {
      const int key_slot = next_keys();
      multiply_keys(key_slot);
      if (step < rows.num_steps() - 1) add_values();
      wgmma_wait<0>();
      pin(sums[0]);
      pin(sums[1]);
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        const int first_key = step * kKeys + panel * kPanelTokens;
        mask_sums(sums[panel], rows.position + thread_row - first_key,
                  rows.num_keys - 1 - first_key);
      }
      begin_step(key_slot);
#pragma unroll
      for (int i = 0; i < kKeys / 32; ++i) {
        softmax.weigh(sums, i);
        softmax.pack(sums, i, p);
      }
      pin(p);
      --step;
    } while (step >= num_unmasked);

    // The scores of a step and half the products of the step before are formed together; the other
    // half while the scores become weights, among which both halves are added up.
    for (; step >= 0; --step) {
      const int value_slot = take_values();
      const int key_slot = next_keys();
      totals.multiply<0>(p, shared.values[value_slot]);
      multiply_keys(key_slot);
      wgmma_wait<1>();
      totals.add<0>();
      totals.multiply<1>(p, shared.values[value_slot]);
      wgmma_wait<1>();
      pin(sums[0]);
      pin(sums[1]);
      begin_step(key_slot);
      softmax.weigh(sums, 0);
      softmax.weigh(sums, 1);
      wgmma_wait<0>();
      totals.add<1>();
      release(values_empty, value_slot);
      softmax.weigh(sums, 2);
      softmax.weigh(sums, 3);
#pragma unroll
      for (int i = 0; i < kKeys / 32; ++i) softmax.pack(sums, i, p);
      pin(p);
    }
    add_values();

    const float inverse[2] = {1.0f / totals.weight_sum(0), 1.0f / totals.weight_sum(1)};
    named_barrier_sync(1 + consumer, kWarpgroup);  // no warp of it reads the queries any more
    write_rows<Shape>(args, rows, totals.out(), inverse, shared.queries[buffer][consumer]);
    mbarrier_arrive(smem_address(&shared.query_turns.empty[buffer][consumer]));
  }
}

__global__ void __launch_bounds__(Shape::kThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionArgs args,
                   const __grid_constant__ Int8Keys keys, const __grid_constant__ Fp8Values values,
                   const __grid_constant__ PrefillWorkSm90 work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // empty in code for other cards
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const auto rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    init_ring(shared.keys_full, shared.keys_empty, Shape::kConsumers);
    init_ring(shared.values_full, shared.values_empty, Shape::kConsumers);
    shared.query_turns.init();
    fence_mbarrier_init();
  }
  for (auto& slot : shared.values) {
    for (ValuePanel& panel : slot) {
      if (threadIdx.x < sizeof(panel.ones) / 4) {
        reinterpret_cast<uint32_t*>(panel.ones)[threadIdx.x] = kOnes;
      }
    }
  }
  fence_async_proxy();  // wgmma reads them
  take_prefill_roles<Shape>(
      args, work, shared, rank, [&] { bring_keys_values(args, keys, values, work, shared, rank); },
      [&](int consumer) { compute(args, shared, consumer); });
#endif
}

}  // namespace

cudaError_t prepare_prefill_int8_fp8_sm90() {
  return cudaFuncSetAttribute(prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(sizeof(Shared)));
}

cudaError_t attention_prefill_int8_fp8_sm90(const AttentionArgs& args, const Int8Keys& keys,
                                            const Fp8Values& values, const PrefillWorkSm90& work,
                                            cudaStream_t stream) {
  return launch_clusters(prefill_kernel, work.num_clusters, Shape::kThreads, sizeof(Shared), stream,
                         args, keys, values, work);
}

}  // namespace longspan::cuda
