#include "backend/cuda/attention_prefill_sm90.h"
#include "backend/cuda/prefill_sm90.cuh"

namespace longspan::cuda {
namespace {

/// The shape of a thread block's work, and what it takes.
template <int head_dim>
struct Shape : PrefillShape<head_dim> {
  static constexpr int kSlotBytes = kKeys * head_dim * 2;
  static constexpr int kSlots = head_dim == 64 ? 8 : 5;
  static constexpr int kProducerRegisters = head_dim == 64 ? 32 : 24;
  static constexpr int kConsumerRegisters = head_dim == 64 ? 160 : 240;
};

/// Shared memory. A slot holds a step's keys or its values, column of panels by column of panels:
/// [kPanels][kKeys][64] in the 128-byte swizzle. Both sides go through the slots in the same order:
/// the keys of a tile's last step; then of each step before it the keys, and the values of the step
/// after it; the values of step 0.
template <class S>
struct Shared {
  alignas(1024) char slots[S::kSlots][S::kSlotBytes];
  alignas(1024) QueryBuffers<S> queries;
  QueryTurns<S> query_turns;
  uint64_t full[S::kSlots];
  uint64_t empty[S::kSlots];
};

/// Half of each slot's panels, the first or the second 64 keys, comes from either thread block and
/// goes to both.
template <class S>
__device__ void bring_keys_values(const AttentionArgs& args, const PrefillWorkSm90& work,
                                  Shared<S>& shared, int rank) {
  const int lane = threadIdx.x % 32;
  const KvLayout& kv = args.kv;
  const int block_panels = kv.block_len / kPanelTokens;
  const int block_shift = block_panels / 2;  // 1, 2, 4 panels: 0, 1, 2
  Turn<S::kSlots> turn;
  const auto bring = [&](const char* from) {
    mbarrier_wait_amid(smem_address(&shared.empty[turn.slot]), turn.parity ^ 1);
    if (lane == 0) {
      const uint32_t full = smem_address(&shared.full[turn.slot]);
      const uint32_t to = smem_address(shared.slots[turn.slot]) + rank * kPanelBytes;
      mbarrier_arrive_expect(full, S::kSlotBytes);
#pragma unroll
      for (int i = 0; i < S::kPanels; ++i) {
        bulk_copy_multicast(to + i * (2 * kPanelBytes), from + i * kPanelBytes, kPanelBytes, full,
                            (1 << kCluster) - 1);
      }
    }
    __syncwarp();
    turn.next();
  };

  const int cluster = blockIdx.x / kCluster;
  const int end = work.first[cluster + 1];
  for (int t = work.first[cluster]; t < end; ++t) {
    const Tile tile = tile_of<S>(args, work.tiles[t], rank);
    const int32_t* table = args.plan.block_tables + tile.seq.table;
    const char* base = kv.key_tile(0, args.layer, tile.head / (args.num_heads / kv.num_kv_heads));
    const int last_panel = (tile.num_keys - 1) / kPanelTokens;
    const int last_step = last_panel / 2;
    // Lane l looks up the block of step 32 group + l, one group ahead. Beyond the last panel it is
    // read again: all that is needed there is finite values.
    const auto panel_of = [&](int group) {
      return max(0, min((group * 32 + lane) * 2 + rank, last_panel));
    };
    int group = last_step / 32;
    int block = table[panel_of(group) >> block_shift];
    const char* at = nullptr;
    const char* values = nullptr;
    for (int step = last_step; step >= 0; --step) {
      if (step == last_step || step % 32 == 31) {
        at = base + block * kv.block_bytes +
             (panel_of(group) & (block_panels - 1)) * (S::kPanels * kPanelBytes);
        --group;
        block = table[panel_of(group) >> block_shift];
      }
      const char* keys = reinterpret_cast<const char*>(
          __shfl_sync(0xffffffffU, reinterpret_cast<uint64_t>(at), step % 32));
      bring(keys);
      if (step < last_step) bring(values);
      values = keys + kv.value.offset;
    }
    bring(values);
  }
}

/// A consumer's queries as the left operand of a product: held in registers where there are enough
/// of them, which saves reading shared memory at every step, and with it power.
template <class S, bool in_registers = S::kHeadDim == 128>
class Queries;

template <class S>
class Queries<S, true> {
 public:
  __device__ explicit Queries(const char* at) {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < S::kHeadDim / 16; ++i) {
      ldmatrix(q_[i], smem_address(at) + i / 4 * kPanelBytes + swizzle(row, i % 4 * 2 + lane / 16));
    }
  }
  template <int i>
  __device__ void multiply(float (&s)[kKeys / 2], uint64_t k) const {
    wgmma_rs<i != 0, false>(s, q_[i], k);
  }

 private:
  uint32_t q_[S::kHeadDim / 16][4];
};

template <class S>
class Queries<S, false> {
 public:
  __device__ explicit Queries(const char* at) : q_(wgmma_operand(smem_address(at))) {}
  template <int i>
  __device__ void multiply(float (&s)[kKeys / 2], uint64_t k) const {
    wgmma_ss<i != 0>(s, wgmma_advance(q_, i / 4 * kPanelBytes + i % 4 * 32), k);
  }

 private:
  uint64_t q_;
};

/// s = q k^T of a step.
template <class S, int i = 0>
__device__ inline void multiply_keys(float (&s)[kKeys / 2], const Queries<S>& q, uint64_t k) {
  q.template multiply<i>(s, wgmma_advance(k, i / 4 * (2 * kPanelBytes) + i % 4 * 32));
  if constexpr (i + 1 < S::kHeadDim / 16) multiply_keys<S, i + 1>(s, q, k);
}

template <class S>
__device__ void compute(const AttentionArgs& args, Shared<S>& shared, int consumer) {
  const int lane = threadIdx.x % 32;
  const int thread_row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  Turn<S::kSlots> turn;
  const auto wait_full = [&] {
    mbarrier_wait_amid(smem_address(&shared.full[turn.slot]), turn.parity);
  };
  const uint32_t empty = cluster_address(smem_address(shared.empty), lane % kCluster);
  const auto release = [&](int slot) {
    if (lane < kCluster) mbarrier_arrive_cluster(empty + slot * sizeof(uint64_t));
  };
  const auto keys = [&](int slot) { return wgmma_operand(smem_address(shared.slots[slot])); };
  const auto values = [&](int slot) {
    return wgmma_operand(smem_address(shared.slots[slot]), 2 * kPanelBytes);
  };

  for (int t = 0;; ++t) {
    const int buffer = t % 2;
    mbarrier_wait_amid(smem_address(&shared.query_turns.full[buffer][consumer]), t / 2 % 2);
    const Rows rows = shared.query_turns.rows[buffer][consumer];
    if (rows.num_keys == 0) return;
    const Queries<S> q(shared.queries[buffer][consumer]);
    const float scale_log2[2] = {rows.scale_log2, rows.scale_log2};

    float o[S::kHeadDim / 2] = {};
    float s[kKeys / 2];
    uint32_t p[kKeys / 16][4];
    float factor[2];
    RunningSoftmax softmax;
    int step = rows.num_steps() - 1;
    const auto mask = [&] {
      const int sees[2] = {rows.sees(args.plan.context, thread_row) - step * kKeys,
                           rows.sees(args.plan.context, thread_row + 8) - step * kKeys};
      mask_scores(s, sees);
    };

    wait_full();
    const int first_slot = turn.next();
    pin(s);
    wgmma_fence();
    multiply_keys<S>(s, q, keys(first_slot));
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    release(first_slot);
    mask();
    softmax_step<true>(s, softmax, scale_log2, factor);
    pack_weights(s, p);
    wait_full();

    // The scores of a step are formed, and turned into weights, while the values of the step after
    // it are added up.
    const auto advance = [&]<bool kMasked>() {
      const int key_slot = turn.next();
      pin(s);
      pin(o);
      pin(p);
      wgmma_fence();
      multiply_keys<S>(s, q, keys(key_slot));
      wgmma_commit();
      wait_full();
      const int value_slot = turn.next();
      wgmma_fence();
      multiply_values(o, p, values(value_slot));
      wgmma_commit();
      wgmma_wait<1>();
      pin(s);
      release(key_slot);
      if (kMasked) mask();
      softmax_step<kMasked>(s, softmax, scale_log2, factor);
      pin(s);
      // Of the next keys. Here because it is a branch: without one, ptxas waits for the products
      // before the weights are formed.
      wait_full();
      wgmma_wait<0>();
      pin(o);
      release(value_slot);
      pack_weights(s, p);
      rescale(o, factor);
    };
    const int num_unmasked = rows.sees(args.plan.context, 0) / kKeys;
    for (--step; step >= num_unmasked; --step) advance.template operator()<true>();
    for (; step >= 0; --step) advance.template operator()<false>();

    const int last_slot = turn.next();
    pin(o);
    pin(p);
    wgmma_fence();
    multiply_values(o, p, values(last_slot));
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
    release(last_slot);

    float sums[2];
    add_up_lanes(softmax, sums);
    if (args.log_sum_exp != nullptr && lane % 4 == 0) {
      const Rows& place = shared.query_turns.rows[buffer][consumer];  // no register kept it
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = thread_row + 8 * h;
        if (row >= place.num_rows) continue;
        args.log_sum_exp[place.log_sum_exp + row * args.log_sum_exp_stride] =
            fmaf(softmax.max[h], place.scale_log2, log2f(sums[h])) * kLn2;
      }
    }
    const float inverse[2] = {1.0f / sums[0], 1.0f / sums[1]};
    named_barrier_sync(1 + consumer, kWarpgroup);  // no warp of it reads the queries any more
    write_rows<S>(args, rows, o, inverse, shared.queries[buffer][consumer]);
    mbarrier_arrive(smem_address(&shared.query_turns.empty[buffer][consumer]));
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionArgs args,
                   const __grid_constant__ PrefillWorkSm90 work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // empty in code for other cards
  extern __shared__ __align__(1024) char memory[];
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(memory);
  const auto rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    init_ring(shared.full, shared.empty, S::kConsumers);
    shared.query_turns.init();
    fence_mbarrier_init();
  }
  take_prefill_roles<S>(
      args, work, shared, rank, [&] { bring_keys_values<S>(args, work, shared, rank); },
      [&](int consumer) { compute<S>(args, shared, consumer); });
#endif
}

template <int head_dim>
cudaError_t prepare() {
  return cudaFuncSetAttribute(prefill_kernel<Shape<head_dim>>,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(sizeof(Shared<Shape<head_dim>>)));
}

template <int head_dim>
cudaError_t launch(const AttentionArgs& args, const PrefillWorkSm90& work, cudaStream_t stream) {
  using S = Shape<head_dim>;
  return launch_clusters(prefill_kernel<S>, work.num_clusters, S::kThreads, sizeof(Shared<S>),
                         stream, args, work);
}

}  // namespace

cudaError_t prepare_prefill_sm90(int32_t head_dim) {
  return head_dim == 64 ? prepare<64>() : head_dim == 128 ? prepare<128>() : cudaErrorInvalidValue;
}

cudaError_t attention_prefill_sm90(const AttentionArgs& args, const PrefillWorkSm90& work,
                                   cudaStream_t stream) {
  return args.kv.head_dim == 64    ? launch<64>(args, work, stream)
         : args.kv.head_dim == 128 ? launch<128>(args, work, stream)
                                   : cudaErrorInvalidValue;
}

}  // namespace longspan::cuda
