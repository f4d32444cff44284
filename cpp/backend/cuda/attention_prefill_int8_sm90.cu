#include "backend/cuda/attention_prefill_int8_sm90.h"
#include "backend/cuda/prefill_int8_softmax.cuh"
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

/// Shared memory. A slot holds a step's keys, [kKeys][128] bytes, and what is known of them,
/// or its values, [kPanels][kKeys][64] bfloat16, in the 128-byte swizzle. Both sides go through the
/// slots in the same order, a tile's last step first.
struct Shared {
  alignas(1024) char keys[Shape::kKeySlots][Shape::kKeyBytes];
  alignas(1024) char values[Shape::kValueSlots][Shape::kValueBytes];
  alignas(1024) QueryBuffers<Shape> queries;
  Int8StepKeys step_keys[Shape::kKeySlots];
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
  const auto bring_keys = [&](const char* from, const Int8StepKeys& step) {
    mbarrier_wait_amid(smem_address(&shared.keys_empty[key_turn.slot]), key_turn.parity ^ 1);
    if (lane == 0) {
      const uint32_t full = smem_address(&shared.keys_full[key_turn.slot]);
      mbarrier_arrive_expect(full, Shape::kKeyBytes + sizeof(float4));
      store_async(smem_address(&shared.step_keys[key_turn.slot]),
                  float4{step.scale[0], step.scale[1], step.length, 0.0f}, full);
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
    const Int8PanelScale* panel_scales = source.scales + first_panel;
    // Lane l looks up the block of step 32 group + l, one group ahead, and its scales. Beyond the
    // last panel it is read again: all that is needed there is finite values.
    const auto panel_of = [&](int group, int half) {
      return max(0, min((group * 32 + lane) * 2 + half, last_panel));
    };
    const auto step_of = [&](int group) {
      const Int8PanelScale low = panel_scales[panel_of(group, 0)];
      const Int8PanelScale high = panel_scales[panel_of(group, 1)];
      return Int8StepKeys{{low.scale, high.scale}, fmaxf(low.length, high.length)};
    };
    int group = last_step / 32;
    int block = table[panel_of(group, rank) >> block_shift];
    Int8StepKeys now{};
    const char* at = nullptr;
    const char* values = nullptr;
    for (int step = last_step; step >= 0; --step) {
      if (step == last_step || step % 32 == 31) {
        at = base + block * kv.block_bytes +
             (panel_of(group, rank) & (block_panels - 1)) * (Shape::kPanels * kPanelBytes);
        now = step_of(group);
        --group;
        block = table[panel_of(group, rank) >> block_shift];
      }
      bring_keys(keys + int64_t{min(step * 2 + rank, last_panel)} * kPanelBytes,
                 {{__shfl_sync(0xffffffffU, now.scale[0], step % 32),
                   __shfl_sync(0xffffffffU, now.scale[1], step % 32)},
                  __shfl_sync(0xffffffffU, now.length, step % 32)});
      if (step < last_step) bring_values(values);
      values = reinterpret_cast<const char*>(
          __shfl_sync(0xffffffffU, reinterpret_cast<uint64_t>(at), step % 32));
    }
    bring_values(values);
  }
}

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
  const auto values = [&](int slot) {
    return wgmma_operand(smem_address(shared.values[slot]), 2 * kPanelBytes);
  };

  for (int t = 0;; ++t) {
    const int buffer = t % 2;
    mbarrier_wait_amid(smem_address(&shared.query_turns.full[buffer][consumer]), t / 2 % 2);
    const Rows rows = shared.query_turns.rows[buffer][consumer];
    if (rows.num_keys == 0) return;
    const Int8Queries q(shared.queries[buffer][consumer]);

    using Weights = uint32_t[kKeys / 16][4];
    constexpr int kNone = -1;
    float o[Shape::kHeadDim / 2] = {};
    Int8Sums sums[2];  // of a step's panels
    Weights p[2];
    Int8Softmax softmax;
    int step = rows.num_steps() - 1;
    int held = kNone;  // the slot of values that are being added up

    const auto multiply_keys = [&](int slot, int panel) {
      q.multiply(sums[panel], wgmma_operand(smem_address(shared.keys[slot]) + panel * kPanelBytes));
      wgmma_commit();
    };
    const auto begin_step = [&](const Int8StepKeys& step_keys) {
      if (!softmax.begin_step(step_keys, q, rows.scale_log2)) return;
      wgmma_wait<0>();
      pin(sums[1]);
      pin(o);
      float factor[2];
      softmax.move_bases(sums, factor);
      rescale(o, factor);
      pin(o);
    };

    // Steps with keys that some rows do not see, one at a time, and one more where that leaves an
    // even number. p[0] has the weights of the step before, whose values are still to be added up.
    const auto advance_alone = [&] {
      const int key_slot = next_keys();
      const Int8StepKeys step_keys = shared.step_keys[key_slot];
      pin(sums[0]);
      pin(sums[1]);
      pin(o);
      wgmma_fence();
      multiply_keys(key_slot, 0);
      multiply_keys(key_slot, 1);
      if (step < rows.num_steps() - 1) {
        held = next_values();
        pin(p[0]);
        wgmma_fence();
        multiply_values(o, p[0], values(held));
        wgmma_commit();
      }
      wgmma_wait<0>();
      pin(sums[0]);
      pin(sums[1]);
      pin(o);
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        const int first_key = step * kKeys + panel * kPanelTokens;
        mask_sums(sums[panel], rows.position + thread_row - first_key,
                  rows.num_keys - 1 - first_key);
      }
      begin_step(step_keys);  // a vote in it says that all lanes have read step_keys
      release(keys_empty, key_slot);
      if (held != kNone) release(values_empty, held);
      held = kNone;
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) softmax.weigh<true>(sums[panel], panel, p[0]);
      pin(p[0]);
      --step;
    };
    begin_sums(sums[0]);
    begin_sums(sums[1]);
    const int num_unmasked = min(rows.position + 1, rows.num_keys) / kKeys;
    do {
      advance_alone();
    } while (step >= num_unmasked || step % 2 == 0);

    // The scores of a step are formed, and turned into weights, while the values of the step after
    // it are added up; these are waited for with the next scores. With the weights in two buffers,
    // the tensor cores have work while weights are formed, and the next scores wait for nothing.
    // The second panel's scores are formed while the first one's become weights.
    const auto advance = [&](const Weights& from, Weights& to) {
      const int key_slot = next_keys();
      const Int8StepKeys step_keys = shared.step_keys[key_slot];
      const int value_slot = next_values();
      pin(sums[0]);
      pin(sums[1]);
      wgmma_fence();
      multiply_keys(key_slot, 0);
      multiply_keys(key_slot, 1);
      multiply_values(o, from, values(value_slot));
      wgmma_commit();
      wgmma_wait<2>();
      pin(sums[0]);
      if (held != kNone) release(values_empty, held);
      held = value_slot;
      begin_step(step_keys);
      softmax.weigh<false>(sums[0], 0, to);
      wgmma_wait<1>();
      pin(sums[1]);
      release(keys_empty, key_slot);
      softmax.weigh<false>(sums[1], 1, to);
      pin(to);
    };
    for (; step > 0; step -= 2) {
      advance(p[0], p[1]);
      advance(p[1], p[0]);
    }

    const int last_slot = next_values();
    wgmma_fence();
    multiply_values(o, p[0], values(last_slot));
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
    if (held != kNone) release(values_empty, held);
    release(values_empty, last_slot);

    float inverse[2];
    softmax.invert_sums(inverse);
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
    init_ring(shared.keys_full, shared.keys_empty, Shape::kConsumers);
    init_ring(shared.values_full, shared.values_empty, Shape::kConsumers);
    shared.query_turns.init();
    fence_mbarrier_init();
  }
  take_prefill_roles<Shape>(
      args, work, shared, rank, [&] { bring_keys_values(args, keys, work, shared, rank); },
      [&](int consumer) { compute(args, shared, consumer); });
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
