#include <type_traits>

#include "backend/cuda/rotate_append.h"
#include "backend/cuda/vector.cuh"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8;  // elements of 16 bytes of bfloat16, the unit of a thread

/// How a launch is laid out: what RotateAppendArgs says, but for the types.
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
};

/// The block of a position; its length is a power of two.
__device__ int64_t block_at(const Task& task, const SeqView& seq, int64_t position) {
  return task.plan.block_tables[seq.table + (position >> (__ffs(task.kv.block_len) - 1))];
}

/// Elements [kChunk chunk, kChunk (chunk + 1)) of a head at x, rotated by row t's angles; norm
/// weights of the head or null, `scale` 1 / rms of the head where there are any.
template <bool kAligned, class T>
__device__ Eight rotated(const Task& task, const T* x, const Eight& own, int chunk, int count,
                         const float (&angles)[kChunk][2], const float* norm, float scale) {
  const int first = chunk * kChunk;
  const int pairs = task.plan.rotary_pairs;
  const auto element = [&](float raw, int d) { return norm ? raw * scale * norm[d] : raw; };
  Eight other;  // the partners; those of an aligned chunk are a chunk too
  if constexpr (kAligned) {
    if (first < 2 * pairs) other = load8(x + (first < pairs ? first + pairs : first - pairs));
  }
  Eight y;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int d = first + i;
    y.x[i] = 0.0f;
    if (!kAligned && i >= count) continue;
    const float a = element(own.x[i], d);
    if (d >= 2 * pairs) {
      y.x[i] = a;
      continue;
    }
    const int partner = d < pairs ? d + pairs : d - pairs;
    const float b = element(kAligned ? other.x[i] : to_float(x[partner]), partner);
    // The first of a pair is a cos - b sin, the second a cos + b sin with b the first.
    y.x[i] = a * angles[i][0] + (d < pairs ? -b : b) * angles[i][1];
  }
  return y;
}

/// One block to a row: groups of kLanes threads share out the row's heads, q | k | v, each thread
/// a chunk of them, so that the row's angles are read once.
template <bool kAligned, int kLanes, class T>
__device__ void append_row(const Task& task, const T* qkv, int32_t t, int32_t seq_index) {
  const KvLayout& kv = task.kv;
  const SeqView& seq = task.plan.seqs[seq_index];
  const int64_t position = seq.first_position + t - seq.first_row;
  const int64_t block = block_at(task, seq, position);
  const int token = static_cast<int>(position & (kv.block_len - 1));
  const int chunk = static_cast<int>(threadIdx.x) % kLanes;
  const int first = chunk * kChunk;
  const int count = min(kChunk, kv.head_dim - first);  // not above 0 in the padding of a panel
  const int pairs = task.plan.rotary_pairs;
  const T* row = qkv + t * task.qkv_stride;
  __nv_bfloat16* q_row = task.q_out + t * task.q_stride;

  float angles[kChunk][2];
  const auto* cos_sin = reinterpret_cast<const float2*>(task.plan.cos_sin) + int64_t{t} * pairs;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int d = first + i;
    const float2 angle = d < 2 * pairs ? cos_sin[d < pairs ? d : d - pairs] : float2{1.0f, 0.0f};
    angles[i][0] = angle.x;
    angles[i][1] = angle.y;
  }

  const float factor = task.q_factor == nullptr ? 1.0f : task.q_factor[t];
  const int heads = task.num_heads + 2 * kv.num_kv_heads;
  constexpr int kGroups = kThreads / kLanes;
  for (int base = 0; base < heads; base += kGroups) {  // every lane stays for the norm's shuffles
    const int head = base + static_cast<int>(threadIdx.x) / kLanes;
    const bool is_q = head < task.num_heads;
    const bool is_v = head >= task.num_heads + kv.num_kv_heads;
    const T* x = row + int64_t{head} * kv.head_dim;
    Eight own{};
    if (head < heads && count > 0) own = load_part<kAligned>(x + first, count);
    const float* norm = is_v ? nullptr : is_q ? task.q_norm : task.k_norm;
    float scale = 1.0f;
    if (task.q_norm != nullptr || task.k_norm != nullptr) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) squares += own.x[i] * own.x[i];
      squares = sum_lanes<kLanes>(squares);
      scale = 1.0f / sqrtf(squares / static_cast<float>(kv.head_dim) + task.norm_eps);
    }
    if (head >= heads) continue;
    Eight y = own;
    if (!is_v && count > 0) {
      y = rotated<kAligned>(task, x, own, chunk, count, angles, norm, scale);
    }
    if (is_q) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) y.x[i] *= factor;
      if (count > 0) {
        store_part<kAligned>(y, q_row + int64_t{head} * kv.head_dim + first, count);
      }
    } else if (first < kv.panels_per_token * kPanelCols) {
      const int kv_head = head - task.num_heads - (is_v ? kv.num_kv_heads : 0);
      char* tile = kv.key_tile(block, task.layer, kv_head) + (is_v ? kv.tile_bytes : 0);
      *reinterpret_cast<uint4*>(tile + kv.chunk_offset(token, chunk)) = to_bf16(y);
    }
  }
}

/// Zeros the values that follow the sequence's last token in its group of panels, where this step
/// begins that group: nobody else writes there.
__device__ void clear_rest(const Task& task, const SeqView& seq, int kv_head) {
  const KvLayout& kv = task.kv;
  const int64_t last = seq.first_position + seq.num_rows - 1;
  if (seq.num_rows == 0 || last - last % kPanelTokens < seq.first_position) return;
  const int64_t block = block_at(task, seq, last);
  const int token = static_cast<int>(last & (kv.block_len - 1));
  const int rest = kPanelTokens - 1 - token % kPanelTokens;
  const int chunks = kv.panels_per_token * (kPanelCols / kChunk);
  char* tile = kv.key_tile(block, task.layer, kv_head) + kv.tile_bytes;
  for (int i = static_cast<int>(threadIdx.x); i < rest * chunks; i += kThreads) {
    const int64_t offset = kv.chunk_offset(token + 1 + i / chunks, i % chunks);
    *reinterpret_cast<uint4*>(tile + offset) = uint4{};
  }
}

/// Blocks: one to each row, then one to each sequence and KV head.
template <bool kAligned, int kLanes, class T>
__global__ void __launch_bounds__(kThreads) rotate_append_kernel(Task task, const T* qkv) {
  const auto index = static_cast<int32_t>(blockIdx.x);
  if (index < task.plan.num_tokens) {
    const int32_t seq = task.plan.row_seq[index];
    if (seq >= 0) append_row<kAligned, kLanes>(task, qkv, index, seq);
  } else {
    const int32_t i = index - task.plan.num_tokens;
    clear_rest(task, task.plan.seqs[i / task.kv.num_kv_heads], i % task.kv.num_kv_heads);
  }
}

}  // namespace

void rotate_append(const RotateAppendArgs& args, cudaStream_t stream) {
  if (args.plan.num_tokens == 0) return;
  const Task task{args.plan,   args.kv,       args.layer,     args.qkv.stride,
                  args.q_out,  args.q_stride, args.num_heads, args.q_norm,
                  args.k_norm, args.norm_eps, args.q_factor};
  const bool aligned = args.kv.head_dim % kChunk == 0 && args.plan.rotary_pairs % kChunk == 0 &&
                       has_whole_eights(args.qkv) && args.q_stride % kChunk == 0 &&
                       reinterpret_cast<uintptr_t>(args.q_out) % 16 == 0;
  const auto blocks =
      static_cast<unsigned>(args.plan.num_tokens + args.plan.num_seqs * args.kv.num_kv_heads);
  with_type(args.qkv.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto lanes) {
      const auto kernel = aligned ? rotate_append_kernel<true, lanes.value, T>
                                  : rotate_append_kernel<false, lanes.value, T>;
      kernel<<<blocks, kThreads, 0, stream>>>(task, static_cast<const T*>(args.qkv.data));
    };
    switch (args.kv.panels_per_token) {
      case 1:
        return launch(std::integral_constant<int, 8>{});
      case 2:
        return launch(std::integral_constant<int, 16>{});
      default:
        return launch(std::integral_constant<int, 32>{});
    }
  });
}

}  // namespace longspan::cuda
