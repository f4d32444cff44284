#include <type_traits>

#include "backend/cuda/kv_quantize.cuh"
#include "backend/cuda/overlap.cuh"
#include "backend/cuda/rotate_append.h"
#include "backend/cuda/turn.cuh"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 8;  // elements of 16 bytes of bfloat16, the unit of a write
constexpr int kGroupChunks = kInt4Group / kChunk;

/// How a launch is laid out: what RotateAppendArgs says.
struct Task {
  PlanView plan;
  KvLayout kv;
  int64_t layer;
  int64_t qkv_stride;
  __nv_bfloat16* q_out;
  int64_t q_stride;
  int32_t num_heads;
  const float* q_norm;
  const float* k_norm;
  float norm_eps;
  const float* q_factor;

  __device__ bool has_int4() const { return kv.value.element == KvElement::kInt4; }
  __device__ bool has_norm() const { return q_norm != nullptr || k_norm != nullptr; }
  /// The block of a key; its length is a power of two.
  __device__ int64_t block_at(const SeqView& seq, int key) const {
    return plan.block_tables[seq.table + (key >> (__ffs(kv.block_len) - 1))];
  }
};

/// A head of a row of qkv, numbered q | k | v.
struct Head {
  int index;
  bool is_q;
  bool is_v;
  int kv_head;

  __device__ Head(const Task& task, int i)
      : index(i),
        is_q(i < task.num_heads),
        is_v(i >= task.num_heads + task.kv.num_kv_heads),
        kv_head(i - task.num_heads - (is_v ? task.kv.num_kv_heads : 0)) {}
  __device__ const KvTile& tile(const Task& task) const {
    return is_v ? task.kv.value : task.kv.key;
  }
  __device__ const float* norm(const Task& task) const {
    return is_v ? nullptr : is_q ? task.q_norm : task.k_norm;
  }
};

/// Where a row's results go.
struct Target {
  __nv_bfloat16* q_row;
  float q_factor;   // of the query as a whole
  float q_rotated;  // of its rotated dims
  bool has_key;     // whether key and value are this rank's
  int64_t block;
  int token;  // within the block

  __device__ Target(const Task& task, int32_t t, int32_t seq_index) {
    const SeqView& seq = task.plan.seqs[seq_index];
    const auto position = static_cast<int>(seq.first_position + t - seq.first_row);
    has_key = task.plan.context.has(position);
    const int key = task.plan.context.keys(position);
    block = has_key ? task.block_at(seq, key) : 0;
    token = key & (task.kv.block_len - 1);
    q_row = task.q_out + t * task.q_stride;
    q_factor = task.q_factor == nullptr ? 1.0f : task.q_factor[t];
    q_rotated = seq.rotated;
  }

  /// Writes the first `count` elements of a chunk of a query.
  template <bool kAligned>
  __device__ void store_q(const Task& task, const Head& head, int chunk, int count, Eight y) const {
    if (count <= 0) return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) y.x[i] *= q_factor;
    store_part<kAligned>(y, q_row + int64_t{head.index} * task.kv.head_dim + chunk * kChunk, count);
  }

  /// Writes a chunk of a key or value, which may be padding, as elements of the cache. What is
  /// beyond a row is left alone.
  template <bool kQuantized>
  __device__ void store_kv(const Task& task, const Head& head, int chunk, const Eight& y,
                           const KvScale& by) const {
    if (chunk * kChunk >= task.kv.row_dim) return;
    const KvTile& tile = head.tile(task);
    char* of_head = task.kv.key_tile(block, task.layer, head.kv_head);
    char* to = of_head + tile.offset;
    if constexpr (!kQuantized) {
      *reinterpret_cast<uint4*>(to + tile.chunk_offset(token, chunk)) = to_bf16(y);
    } else if (tile.element == KvElement::kInt6) {
      const uint2 codes = quantize8<KvElement::kInt6>(y, by);
      to += tile.chunk_offset(token, chunk / 4);
      reinterpret_cast<uint32_t*>(to)[chunk % 4] = codes.x;
      *reinterpret_cast<uint16_t*>(of_head + tile.high_offset(token, chunk)) =
          static_cast<uint16_t>(codes.y);
    } else if (tile.element == KvElement::kInt4) {
      to += tile.chunk_offset(token, chunk / 4);
      reinterpret_cast<uint32_t*>(to)[chunk % 4] = quantize8<KvElement::kInt4>(y, by).x;
    } else {
      to += tile.chunk_offset(token, chunk / 2);
      reinterpret_cast<uint2*>(to)[chunk % 2] = tile.element == KvElement::kInt8
                                                    ? quantize8<KvElement::kInt8>(y, by)
                                                    : quantize8<KvElement::kFp8>(y, by);
    }
  }

  /// Writes the scale that chunk `chunk` of a head is quantised by, if the chunk is the first with
  /// it.
  __device__ void store_scale(const Task& task, const Head& head, int chunk,
                              const KvScale& by) const {
    if (chunk * kChunk >= task.kv.row_dim) return;
    const KvTile& tile = head.tile(task);
    char* to =
        task.kv.key_tile(block, task.layer, head.kv_head) + tile.scales + token * tile.scale_bytes;
    const uint32_t scale = __float_as_uint(by.scale) >> 16;
    if (tile.element != KvElement::kInt4) {
      if (chunk == 0) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(scale);
    } else if (chunk % kGroupChunks == 0) {
      reinterpret_cast<uint32_t*>(to)[chunk / kGroupChunks] =
          scale | (__float_as_uint(by.zero) & 0xffff0000);
    }
  }
};

/// What a chunk is quantised by, of a head that kLanes lanes share. `own`: of the thread's part of
/// the head; `group`: of its part of the chunk's group in int4. For all lanes to call.
template <int kLanes>
__device__ KvScale scale_of(const Task& task, const Head& head, KvRange own, KvRange group) {
  const KvElement element = head.tile(task).element;
  own.merge_magnitudes<kLanes>();
  if (task.has_int4()) group.merge_all<kGroupChunks>();
  return (element == KvElement::kInt4 ? group : own).of(element);
}

/// turn_head(), a head in runs of whole chunks, of which each lane has that of its number.
__device__ void turn_head(int head_dim, int chunk, Eight& y) {
  const int run = head_dim & -head_dim;
  turn_run(chunk, run / kChunk, y);
  const float scale = 1.0f / sqrtf(static_cast<float>(run));
#pragma unroll
  for (float& x : y.x) x *= scale;
}

/// turn_head() of a head that is one run, of which each lane has a chunk of either half.
__device__ void turn_halves(int head_dim, int lane, Eight& a, Eight& b) {
  turn_run(lane, head_dim / 2 / kChunk, a);
  turn_run(lane, head_dim / 2 / kChunk, b);
  const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float first = a.x[i];
    a.x[i] = (first + b.x[i]) * scale;
    b.x[i] = (first - b.x[i]) * scale;
  }
}

__device__ float sum_of_squares(const Eight& v) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += v.x[i] * v.x[i];
  return sum;
}

__device__ float norm_scale(const Task& task, float squares) {
  return 1.0f / sqrtf(squares / static_cast<float>(task.kv.head_dim) + task.norm_eps);
}

/// A row whose heads and rotated halves are whole chunks; of a quantised cache, a head that rotates
/// whole and is one run of turn_head(). A thread takes two chunks of a head: the two that
/// rotate by the same angles, or two that pass through; groups of kLanes threads share out the
/// heads, so that the angles are read once.
template <int kLanes, bool kQuantized>
__device__ void append_aligned(const Task& task, const __nv_bfloat16* __restrict__ row, int32_t t,
                               const Target& target) {
  const int head_dim = task.kv.head_dim;
  const int turning = task.plan.rotary_pairs / kChunk;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool turns = lane < turning;
  const int chunk_a = turns ? lane : 2 * lane;
  const int chunk_b = turns ? lane + turning : 2 * lane + 1;
  const bool has_a = chunk_a * kChunk < head_dim;
  const bool has_b = chunk_b * kChunk < head_dim;
  float2 angle[kChunk];
  const auto* angles = reinterpret_cast<const float4*>(task.plan.cos_sin) +
                       (int64_t{t} * task.plan.rotary_pairs + lane * kChunk) / 2;
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const float4 two = turns ? angles[i] : float4{1.0f, 0.0f, 1.0f, 0.0f};
    angle[2 * i] = {two.x, two.y};
    angle[2 * i + 1] = {two.z, two.w};
  }

  const int heads = task.num_heads + 2 * task.kv.num_kv_heads;
  constexpr int kGroups = kThreads / kLanes;
#pragma unroll 2
  for (int base = 0; base < heads; base += kGroups) {  // every lane stays for the norm's shuffles
    const Head head(task, base + static_cast<int>(threadIdx.x) / kLanes);
    const __nv_bfloat16* x = row + int64_t{head.index} * head_dim;
    Eight a{};
    Eight b{};
    if (head.index < heads && has_a) a = load8(x + chunk_a * kChunk);
    if (head.index < heads && has_b) b = load8(x + chunk_b * kChunk);
    if (task.has_norm()) {
      const float squares = sum_lanes<kLanes>(sum_of_squares(a) + sum_of_squares(b));
      const float* norm = head.norm(task);
      if (norm != nullptr) {
        const float scale = norm_scale(task, squares);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (has_a) a.x[i] *= scale * norm[chunk_a * kChunk + i];
          if (has_b) b.x[i] *= scale * norm[chunk_b * kChunk + i];
        }
      }
    }
    if (!head.is_v) {
      const float scale = head.is_q && turns ? target.q_rotated : 1.0f;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float first = a.x[i];
        a.x[i] = (first * angle[i].x - b.x[i] * angle[i].y) * scale;
        b.x[i] = (b.x[i] * angle[i].x + first * angle[i].y) * scale;
      }
    }
    KvScale by_a{};
    KvScale by_b{};
    if constexpr (kQuantized) {  // every lane, for the shuffles
      Eight turned_a = a;
      Eight turned_b = b;
      turn_halves(head_dim, lane, turned_a, turned_b);
      if (!head.is_v) {
        a = turned_a;
        b = turned_b;
      }
      KvRange range_a;
      KvRange range_b;
      if (has_a) range_a.add(a);
      if (has_b) range_b.add(b);
      KvRange both = range_a;
      both.magnitude = max(both.magnitude, range_b.magnitude);
      by_a = scale_of<kLanes>(task, head, both, range_a);
      by_b = scale_of<kLanes>(task, head, both, range_b);
    }
    if (head.index >= heads) continue;
    if (head.is_q) {
      target.store_q<true>(task, head, chunk_a, has_a ? kChunk : 0, a);
      target.store_q<true>(task, head, chunk_b, has_b ? kChunk : 0, b);
      continue;
    }
    if (!target.has_key) continue;
    target.store_kv<kQuantized>(task, head, chunk_a, a, by_a);
    target.store_kv<kQuantized>(task, head, chunk_b, b, by_b);
    if constexpr (kQuantized) {
      target.store_scale(task, head, chunk_a, by_a);
      target.store_scale(task, head, chunk_b, by_b);
    }
  }
}

/// Any row. A thread takes one chunk of a head and reads each element's partner as well.
template <int kLanes, bool kQuantized>
__device__ void append_any(const Task& task, const __nv_bfloat16* __restrict__ row, int32_t t,
                           const Target& target) {
  const int head_dim = task.kv.head_dim;
  const int pairs = task.plan.rotary_pairs;
  const int chunk = static_cast<int>(threadIdx.x) % kLanes;
  const int count = min(kChunk, head_dim - chunk * kChunk);  // not above 0 in a panel's padding
  const auto* angles = reinterpret_cast<const float2*>(task.plan.cos_sin) + int64_t{t} * pairs;
  const int heads = task.num_heads + 2 * task.kv.num_kv_heads;
  constexpr int kGroups = kThreads / kLanes;
  for (int base = 0; base < heads; base += kGroups) {  // every lane stays for the norm's shuffles
    const Head head(task, base + static_cast<int>(threadIdx.x) / kLanes);
    const __nv_bfloat16* x = row + int64_t{head.index} * head_dim;
    Eight y{};
    if (head.index < heads) y = load_part<false>(x + chunk * kChunk, count);
    const float* norm = head.norm(task);
    float scale = 1.0f;
    if (task.has_norm()) scale = norm_scale(task, sum_lanes<kLanes>(sum_of_squares(y)));
    const auto normed = [&](float value, int d) { return norm ? value * scale * norm[d] : value; };
    for (int i = 0; i < count && !head.is_v; ++i) {
      const int d = chunk * kChunk + i;
      y.x[i] = normed(y.x[i], d);
      if (d >= 2 * pairs) continue;
      const int partner = d < pairs ? d + pairs : d - pairs;
      const float other = normed(to_float(x[partner]), partner);
      const float2 angle = angles[min(d, partner)];
      y.x[i] = y.x[i] * angle.x + (d < pairs ? -other : other) * angle.y;
      if (head.is_q) y.x[i] *= target.q_rotated;
    }
    KvScale by{};
    if constexpr (kQuantized) {  // every lane, for the shuffles
      Eight turned = y;
      turn_head(head_dim, chunk, turned);
      if (!head.is_v) y = turned;
      KvRange range;
      if (count > 0) range.add(y);
      by = scale_of<kLanes>(task, head, range, range);
    }
    if (head.index >= heads) continue;
    if (head.is_q) {
      target.store_q<false>(task, head, chunk, count, y);
      continue;
    }
    if (!target.has_key) continue;
    target.store_kv<kQuantized>(task, head, chunk, y, by);
    if constexpr (kQuantized) target.store_scale(task, head, chunk, by);
  }
}

/// Zeros the values that follow the sequence's last token here in its group of panels, where this
/// step begins that group: nobody else writes there.
__device__ void clear_rest(const Task& task, const SeqView& seq, int kv_head) {
  const KvLayout& kv = task.kv;
  const auto first_position = static_cast<int>(seq.first_position);
  const int num_old = task.plan.context.keys(first_position);
  const int last = task.plan.context.keys(first_position + seq.num_rows) - 1;
  if (last < num_old || last - last % kPanelTokens < num_old) return;
  const int64_t block = task.block_at(seq, last);
  const int token = last & (kv.block_len - 1);
  const int rest = kPanelTokens - 1 - token % kPanelTokens;
  const int chunks = kv.row_dim / kChunk;
  char* tile = kv.key_tile(block, task.layer, kv_head) + kv.value.offset;
  for (int i = static_cast<int>(threadIdx.x); i < rest * chunks; i += kThreads) {
    const int64_t offset = kv.value.chunk_offset(token + 1 + i / chunks, i % chunks);
    *reinterpret_cast<uint4*>(tile + offset) = uint4{};
  }
}

/// Blocks: one to each row, then, of a cache in bfloat16, one to each sequence and KV head. kLanes:
/// threads to a head.
template <bool kAligned, int kLanes, bool kQuantized>
__global__ void __launch_bounds__(kThreads)
    rotate_append_kernel(Task task, const __nv_bfloat16* qkv) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const auto index = static_cast<int32_t>(blockIdx.x);
  if (index < task.plan.num_tokens) {
    const int32_t seq = task.plan.row_seq[index];
    if (seq < 0) return;
    const __nv_bfloat16* row = qkv + index * task.qkv_stride;
    if constexpr (kAligned) {
      append_aligned<kLanes, kQuantized>(task, row, index, Target(task, index, seq));
    } else {
      append_any<kLanes, kQuantized>(task, row, index, Target(task, index, seq));
    }
  } else {
    const int32_t i = index - task.plan.num_tokens;
    clear_rest(task, task.plan.seqs[i / task.kv.num_kv_heads], i % task.kv.num_kv_heads);
  }
}

}  // namespace

void rotate_append(const RotateAppendArgs& args, cudaStream_t stream) {
  if (args.plan.num_tokens == 0) return;
  const KvLayout& kv = args.kv;
  const Task task{args.plan,   args.kv,       args.layer,     args.qkv.stride,
                  args.q_out,  args.q_stride, args.num_heads, args.q_norm,
                  args.k_norm, args.norm_eps, args.q_factor};
  const bool quantised = kv.key.element != KvElement::kNative;
  const bool whole = 2 * args.plan.rotary_pairs == kv.head_dim;
  // A group of int4 is a group of lanes where all dims rotate, in halves that are whole groups.
  const bool grouped =
      kv.value.element != KvElement::kInt4 || (whole && args.plan.rotary_pairs % kInt4Group == 0);
  const bool one_run = !quantised || (whole && (kv.head_dim & (kv.head_dim - 1)) == 0);
  const bool aligned = kv.head_dim % kChunk == 0 && args.plan.rotary_pairs % kChunk == 0 &&
                       grouped && one_run && has_whole_eights(args.qkv) &&
                       args.q_stride % kChunk == 0 &&
                       reinterpret_cast<uintptr_t>(args.q_out) % 16 == 0;
  const auto blocks = static_cast<unsigned>(args.plan.num_tokens +
                                            (quantised ? 0 : args.plan.num_seqs * kv.num_kv_heads));
  const auto launch = [&](auto lanes, auto is_quantized) {  // of 8 elements, 16 where aligned
    constexpr int kLanes = lanes.value;
    constexpr bool kQuantized = is_quantized.value;
    const auto kernel = aligned ? rotate_append_kernel<true, kLanes / 2, kQuantized>
                                : rotate_append_kernel<false, kLanes, kQuantized>;
    launch_overlapped(kernel, blocks, kThreads, 0, stream, task,
                      static_cast<const __nv_bfloat16*>(args.qkv.data));
  };
  const auto choose = [&](auto is_quantized) {
    if (kv.row_dim <= 64) return launch(std::integral_constant<int, 8>{}, is_quantized);
    if (kv.row_dim <= 128) return launch(std::integral_constant<int, 16>{}, is_quantized);
    return launch(std::integral_constant<int, 32>{}, is_quantized);
  };
  quantised ? choose(std::true_type{}) : choose(std::false_type{});
}

}  // namespace longspan::cuda
