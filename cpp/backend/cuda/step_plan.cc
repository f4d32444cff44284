#include "backend/cuda/step_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <numeric>

#include "backend/cuda/angles.h"
#include "backend/cuda/attention_prefill_mma.h"
#include "backend/cuda/cuda_check.h"
#include "core/check.h"

namespace longspan::cuda {
namespace {

/// Rows up to which a sequence goes to the decode kernel: its keys are then read once per
/// kDecodePairs (row, head) pairs, which is less work than a prefill tile that is mostly empty.
constexpr int64_t kDecodeRows = 16;
constexpr int kSlots = 3;  // of the upload ring: two steps may be under way
constexpr int64_t kAlignment = 256;

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

DecodeSizes decode_sizes(const StepLimits& limits, const AttentionShape& shape) {
  return max_decode_sizes(limits.max_seqs, kDecodeRows, limits.max_keys(), shape.num_heads,
                          shape.num_kv_heads);
}

int64_t workspace_panels_of(const StepLimits& limits, const AttentionShape& shape) {
  if (!CudaStepPlan::has_workspace(limits)) return 0;
  return workspace_panels(limits.max_keys(), limits.max_seqs, shape.num_kv_heads);
}

/// A block of one panel of one head, as the workspace of prefills has them.
KvShape panel_shape(const AttentionShape& shape) { return {1, 1, shape.head_dim, kPanelTokens}; }

/// Arrays that go to the device in one copy, put one after another into a slot of a ring.
class Packer {
 public:
  explicit Packer(char* host) : host_(host) {}

  /// Offset of a copy of values; what is added next lies behind room for at least `room` of them.
  template <class T>
  int64_t add(std::span<const T> values, int64_t room = 0) {
    const int64_t offset = used_;
    if (!values.empty()) std::memcpy(host_ + offset, values.data(), values.size_bytes());
    used_ += round_up(std::max(std::ssize(values), room) * static_cast<int64_t>(sizeof(T)));
    return offset;
  }
  int64_t used() const { return used_; }

 private:
  char* host_;
  int64_t used_ = 0;
};

/// A PlannedPass whose arrays are at offsets in a slot of the ring.
struct PackedPass {
  PrefillPass pass;
  int64_t seqs = 0;
  int64_t tiles = 0;
  size_t num_tiles = 0;
  int64_t first = 0;
  int32_t num_clusters = 0;
};

PackedPass pack_pass(const PrefillPass& pass, std::span<const PrefillSeq> seqs,
                     const AttentionShape& shape, bool uses_sm90, int32_t num_sms, Packer& packer) {
  const auto kv_heads = pass.num_kv_heads;
  const auto heads = static_cast<int32_t>(shape.num_heads / shape.num_kv_heads) * kv_heads;
  PackedPass packed;
  packed.pass = pass;
  std::vector<int32_t> indices;
  for (const PrefillSeq& seq : seqs) indices.push_back(seq.seq);
  packed.seqs = packer.add(std::span<const int32_t>(indices));
  PrefillSchedule schedule;
  if (uses_sm90) {
    schedule =
        schedule_prefill_sm90(seqs, heads, kv_heads, static_cast<int32_t>(shape.head_dim), num_sms);
    packed.first = packer.add(std::span<const int32_t>(schedule.first));
    packed.num_clusters = static_cast<int32_t>(schedule.first.size()) - 1;
  } else {
    append_prefill_tiles(seqs, heads, &schedule.tiles);
  }
  packed.tiles = packer.add(std::span<const PrefillTile>(schedule.tiles));
  packed.num_tiles = schedule.tiles.size();
  return packed;
}

}  // namespace

CudaStepPlan::Memory::Memory(char* base, const StepLimits& limits, const AttentionShape& shape) {
  const int64_t rows = decode_sizes(limits, shape).partial_rows;
  const auto take = [&](auto& array, int64_t count) {
    using T = std::remove_pointer_t<std::remove_reference_t<decltype(array)>>;
    array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)));
  };
  take(row_seq, limits.max_tokens);
  take(cos_sin, limits.max_tokens * shape.head_dim);
  take(partial_out, rows * shape.head_dim);
  take(partial_lse, rows);
  const int64_t panel_count = workspace_panels_of(limits, shape);
  const int64_t in_bf16 = limits.kv_format == KvFormat::kNative ? 0 : panel_count;
  take(panels, in_bf16 * KvLayout::of(panel_shape(shape)).block_bytes);
  take(identity, in_bf16);
  const int64_t in_int8 = limits.prefill_attention == PrefillAttention::kNative ? 0 : panel_count;
  take(int8_panels, in_int8 * kPanelBytes);
  take(int8_scales, in_int8);
  take(key_means, in_int8 == 0 ? 0 : limits.max_seqs * shape.num_kv_heads * shape.head_dim);
  const int64_t in_fp8 = limits.prefill_attention == PrefillAttention::kInt8Fp8 ? panel_count : 0;
  take(fp8_panels, in_fp8 * kPanelBytes);
  take(fp8_scales, in_fp8);
}

int64_t CudaStepPlan::upload_bytes(const StepLimits& limits, const AttentionShape& shape,
                                   const DeviceFacts& facts) {
  const DecodeSizes decode = decode_sizes(limits, shape);
  const auto heads = static_cast<int32_t>(shape.num_heads);
  const int64_t tiles =
      std::max(((limits.max_tokens + kPrefillRows - 1) / kPrefillRows + limits.max_seqs) * heads,
               max_prefill_tiles_sm90(limits.max_seqs, limits.max_tokens, heads,
                                      static_cast<int32_t>(shape.num_kv_heads),
                                      static_cast<int32_t>(shape.head_dim)));
  const auto size = [](int64_t count, size_t element) {
    return round_up(count * static_cast<int64_t>(element));
  };
  // Passes go sequence by sequence at the most.
  const int64_t passes = workspace_panels_of(limits, shape) == 0 ? 1 : limits.max_seqs;
  return 2 * size(limits.max_seqs, sizeof(SeqView)) + size(limits.max_seqs, sizeof(int32_t)) +
         size(limits.max_seqs * limits.max_blocks_per_seq, sizeof(int32_t)) +
         2 * size(limits.max_tokens, sizeof(int32_t)) +  // ids, and factors of queries
         size(limits.max_seqs * shape.head_dim / 2, sizeof(double)) +
         size(tiles, sizeof(PrefillTile)) + 2 * passes * kAlignment +  // each pass begins aligned
         passes * size(prefill_clusters_sm90(facts.num_sms) + 1, sizeof(int32_t)) +
         size(decode.spans, sizeof(DecodeSpan)) + size(decode.merges, sizeof(DecodeMerge)) +
         size(1, sizeof(DecodeCounts));
}

CudaStepPlan::CudaStepPlan(const StepLimits& limits, const AttentionShape& shape,
                           const DeviceFacts& facts)
    : limits_(limits),
      shape_(shape),
      facts_(facts),
      uses_sm90_(facts.is_hopper() && (shape.head_dim == 64 || shape.head_dim == 128)),
      workspace_panels_(workspace_panels_of(limits, shape)),
      buffer_(allocate_device(Memory(nullptr, limits, shape).bytes)),
      memory_(buffer_.as<char>(), limits, shape),
      ring_(upload_bytes(limits, shape, facts), kSlots) {
  const KvLayout kv =
      KvLayout::of({1, shape.num_kv_heads, shape.head_dim, limits.block_len, limits.kv_format});
  check_cuda(plan_decode(kv, &decode_launch_), "planning decode");
  const auto prepare = uses_sm90_ ? prepare_prefill_sm90 : prepare_prefill_mma;
  check_cuda(prepare(static_cast<int32_t>(shape.head_dim)), "preparing prefill");
  if (prefill_attention() == PrefillAttention::kInt8) {
    check_cuda(prepare_prefill_int8_sm90(), "preparing prefill");
  } else if (prefill_attention() == PrefillAttention::kInt8Fp8) {
    check_cuda(prepare_prefill_int8_fp8_sm90(), "preparing prefill");
  }
  std::vector<int32_t> identity(
      static_cast<size_t>(limits.kv_format == KvFormat::kNative ? 0 : workspace_panels_));
  std::iota(identity.begin(), identity.end(), 0);
  check_cuda(cudaMemcpy(memory_.identity, identity.data(), identity.size() * sizeof(int32_t),
                        cudaMemcpyHostToDevice),
             "filling the workspace of prefills");
  workspace_.panels = memory_.panels;
  workspace_.identity = memory_.identity;
  workspace_.int8_panels = memory_.int8_panels;
  workspace_.int8_scales = memory_.int8_scales;
  workspace_.key_means = memory_.key_means;
  workspace_.fp8_panels = memory_.fp8_panels;
  workspace_.fp8_scales = memory_.fp8_scales;
}

int64_t CudaStepPlan::bytes(const StepLimits& limits, const AttentionShape& shape,
                            const DeviceFacts& facts) {
  return Memory(nullptr, limits, shape).bytes + upload_bytes(limits, shape, facts);
}

void CudaStepPlan::plan_sequences(const StepInput& input) {
  seqs_.clear();
  tables_.clear();
  prefill_seqs_.clear();
  decode_seqs_.clear();
  has_unseeing_rows_ = false;
  const ContextShard& context = view_.context;
  for (size_t s = 0; s < input.first_position.size(); ++s) {
    SeqView seq;
    seq.first_position = input.first_position[s];
    seq.table = static_cast<int64_t>(tables_.size());
    seq.first_row = static_cast<int32_t>(input.cu_seqlens[s]);
    seq.num_rows = static_cast<int32_t>(input.cu_seqlens[s + 1] - input.cu_seqlens[s]);
    const AttentionScale scale = attention_scale(*input.profiles[s], shape_.head_dim);
    seq.rotated = static_cast<float>(scale.rotated);
    seq.scale_log2 = static_cast<float>(scale.softmax * std::numbers::log2e);
    const std::vector<int32_t>& table = input.block_tables[s];
    tables_.insert(tables_.end(), table.begin(), table.end());
    const auto index = static_cast<int32_t>(s);
    const int64_t keys = context.keys(seq.first_position + seq.num_rows);
    has_unseeing_rows_ |= context.keys(seq.first_position + 1) == 0;
    if (keys > 0 && seq.num_rows <= kDecodeRows) {
      decode_seqs_.push_back({index, seq.num_rows, keys});
    } else if (keys > 0) {
      prefill_seqs_.push_back({index, seq.num_rows, seq.first_position, context});
    }
    seqs_.push_back(seq);
  }
}

void CudaStepPlan::plan_profiles(const StepInput& input) {
  inv_freq_.clear();
  std::vector<const RopeProfile*> known;
  for (size_t s = 0; s < seqs_.size(); ++s) {
    const RopeProfile* profile = input.profiles[s].get();
    size_t index = 0;
    while (index < known.size() && known[index]->inv_freq != profile->inv_freq) ++index;
    if (index == known.size()) {
      known.push_back(profile);
      inv_freq_.insert(inv_freq_.end(), profile->inv_freq.begin(), profile->inv_freq.end());
    }
    seqs_[s].profile = static_cast<int32_t>(index);
  }
  view_.rotary_pairs = static_cast<int32_t>(known.empty() ? 0 : known.front()->inv_freq.size());
}

void CudaStepPlan::plan_query_factors(const StepInput& input) {
  query_factors_.clear();
  for (size_t s = 0; s < seqs_.size(); ++s) {
    if (input.profiles[s]->logn_length == 0) continue;
    query_factors_.resize(input.token_ids.size(), 1.0f);
    for (int64_t r = 0; r < seqs_[s].num_rows; ++r) {
      query_factors_[static_cast<size_t>(seqs_[s].first_row + r)] =
          query_scale(*input.profiles[s], seqs_[s].first_position + r + 1);
    }
  }
}

std::optional<StepShape> CudaStepPlan::shape_below(int64_t rows) const {
  if (!is_uniform_ || num_tokens() >= rows) return std::nullopt;
  return StepShape{view_.num_tokens, view_.rotary_pairs, query_factor_ != nullptr, cache_};
}

void CudaStepPlan::plan(const StepInput& input, const KvCache& cache, cudaStream_t stream) {
  view_.context = cache.shape.context();
  plan_sequences(input);
  plan_profiles(input);
  plan_query_factors(input);
  const auto heads = static_cast<int32_t>(shape_.num_heads);
  const auto kv_heads = static_cast<int32_t>(shape_.num_kv_heads);
  has_decode_ = !decode_seqs_.empty();
  is_uniform_ =
      prefill_seqs_.empty() && input.num_tokens() == input.num_seqs() && !has_unseeing_rows_;
  cache_ = cache.pool.data();
  // Room for what as many sequences can need at most; the tables, of any length, come last.
  const int64_t uniform_seqs = is_uniform_ ? input.num_seqs() : 0;
  const DecodeSizes room =
      max_decode_sizes(uniform_seqs, 1, limits_.max_keys(), shape_.num_heads, shape_.num_kv_heads);

  Packer packer(ring_.begin());
  const int64_t seqs = packer.add(std::span<const SeqView>(seqs_));
  const int64_t ids = packer.add(std::span<const int32_t>(input.token_ids));
  const int64_t freqs =
      packer.add(std::span<const double>(inv_freq_), uniform_seqs * view_.rotary_pairs);
  const int64_t factors = packer.add(std::span<const float>(query_factors_));
  const std::vector<PrefillPass> passes =
      plan_prefill_passes(prefill_seqs_, kv_heads, workspace_panels_);
  std::vector<PackedPass> packed_passes;
  std::vector<SeqView> staged(seqs_);
  for (const PrefillPass& pass : passes) {
    const auto seqs_of_pass =
        std::span<const PrefillSeq>(prefill_seqs_)
            .subspan(static_cast<size_t>(pass.first_seq), static_cast<size_t>(pass.num_seqs));
    packed_passes.push_back(
        pack_pass(pass, seqs_of_pass, shape_, uses_sm90_, facts_.num_sms, packer));
    int64_t panel = 0;
    for (const PrefillSeq& seq : seqs_of_pass) {
      staged[static_cast<size_t>(seq.seq)].table = panel;
      panel += panels_of(seq.keys(seq.num_rows));
    }
  }
  const int64_t staged_seqs = packer.add(std::span<const SeqView>(staged));
  const DecodeSpans decode(decode_seqs_, heads, kv_heads, decode_launch_.grid);
  const int64_t spans = packer.add(std::span<const DecodeSpan>(decode.spans()), room.spans);
  const int64_t merges = packer.add(std::span<const DecodeMerge>(decode.merges()), room.merges);
  const DecodeCounts counts{static_cast<int32_t>(decode.spans().size()),
                            static_cast<int32_t>(decode.merges().size())};
  const int64_t count = packer.add(std::span<const DecodeCounts>(&counts, 1));
  const int64_t tables = packer.add(std::span<const int32_t>(tables_));
  const char* device = ring_.upload(packer.used(), stream);

  const auto at = [device](auto& pointer, int64_t offset) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(device + offset);
  };
  at(view_.seqs, seqs);
  at(view_.block_tables, tables);
  at(view_.token_ids, ids);
  at(view_.inv_freq, freqs);
  query_factor_ = nullptr;
  if (!query_factors_.empty()) at(query_factor_, factors);
  view_.row_seq = memory_.row_seq;
  view_.cos_sin = memory_.cos_sin;
  view_.num_seqs = static_cast<int32_t>(seqs_.size());
  view_.num_tokens = static_cast<int32_t>(input.num_tokens());
  prefills_.clear();
  for (const PackedPass& packed : packed_passes) {
    PlannedPass& planned = prefills_.emplace_back();
    planned.pass = packed.pass;
    at(planned.sm90.tiles, packed.tiles);
    at(planned.sm90.first, packed.first);
    planned.sm90.num_clusters = packed.num_clusters;
    planned.tiles = {planned.sm90.tiles, packed.num_tiles};
    at(planned.seqs, packed.seqs);
  }
  at(workspace_.seqs, staged_seqs);
  at(decode_.spans, spans);
  at(decode_.merges, merges);
  at(decode_.counts, count);
  decode_.partial_out = memory_.partial_out;
  decode_.partial_lse = memory_.partial_lse;
  fill_angles(view_, memory_.row_seq, memory_.cos_sin, stream);
}

}  // namespace longspan::cuda
