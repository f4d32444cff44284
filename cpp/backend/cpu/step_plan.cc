#include "backend/cpu/step_plan.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "backend/cpu/attention_task.h"

namespace longspan::cpu {
namespace {

/// Positions that share one exact angle; the others turn on from it.
constexpr int64_t kTurns = 32;

/// Most spans of decoding sequences that are shared out one by one in a step: bounds the workspace.
/// A sequence beyond it is left whole, with the same result.
constexpr int64_t kMaxSplitSpans = 4096;

/// Fewest rows worth a pass over the keys of their own.
constexpr int64_t kMinUnitRows = kStripRows;

/// Units per thread below which units are made smaller, for balance.
constexpr int64_t kUnitsPerThread = 4;

int64_t group_of(const AttentionShape& shape) { return shape.num_heads / shape.num_kv_heads; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t split_spans(const StepLimits& limits) {
  constexpr int64_t kMaxBlockLen = 256;
  const int64_t spans = ceil_div(limits.max_blocks_per_seq * kMaxBlockLen, kSpanKeys);
  return std::min(kMaxSplitSpans, spans * limits.max_seqs);
}

/// Tokens of a unit of about `rows` rows.
int64_t tokens_of(int64_t rows, int64_t group) { return std::max<int64_t>(1, rows / group); }

/// Places arrays one after another, each on cache lines of its own. A null base only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace

CpuStepPlan::Memory::Memory(char* base, const StepLimits& limits, const AttentionShape& shape,
                            int num_threads) {
  Arena arena(base);
  const int64_t half = shape.head_dim / 2;
  const int64_t group = group_of(shape);
  const int64_t slots = split_spans(limits) * shape.num_kv_heads;
  const int64_t runs =
      ceil_div(limits.max_tokens, tokens_of(kMinUnitRows, group)) + limits.max_seqs;
  token_ids = arena.take<int32_t>(limits.max_tokens);
  cos = arena.take<float>(limits.max_tokens * half);
  sin = arena.take<float>(limits.max_tokens * half);
  q_scale = arena.take<float>(limits.max_tokens);
  sequences = arena.take<SequenceStep>(limits.max_seqs);
  block_tables = arena.take<int32_t>(limits.max_seqs * limits.max_blocks_per_seq);
  inv_freq = arena.take<double>(limits.max_seqs * half);
  turns = arena.take<double>(limits.max_seqs * half * kTurns * 2);
  appends = arena.take<AppendUnit>(ceil_div(limits.max_tokens, kKeyTile) + 2 * limits.max_seqs);
  units = arena.take<AttentionUnit>(runs * shape.num_kv_heads + slots);
  merges = arena.take<MergeUnit>(limits.max_seqs * shape.num_kv_heads);
  partials = arena.take<float>(slots * partial_floats(group, shape.head_dim));
  scratch = arena.take<char>(num_threads * attention_scratch_bytes(group, shape.head_dim));
  bytes = arena.used();
}

CpuStepPlan::CpuStepPlan(const StepLimits& limits, const AttentionShape& shape, int num_threads)
    : limits_(limits),
      shape_(shape),
      buffer_(allocate_host(bytes(limits, shape, num_threads))),
      memory_(buffer_.as<char>(), limits, shape, num_threads) {}

int64_t CpuStepPlan::bytes(const StepLimits& limits, const AttentionShape& shape, int num_threads) {
  return Memory(nullptr, limits, shape, num_threads).bytes;
}

float* CpuStepPlan::partial(int64_t index) const {
  return memory_.partials + index * partial_floats(group_of(shape_), shape_.head_dim);
}

char* CpuStepPlan::scratch(int thread) const {
  return memory_.scratch + thread * attention_scratch_bytes(group_of(shape_), shape_.head_dim);
}

void CpuStepPlan::plan(const StepInput& input, const ContextShard& context, ThreadPool& pool) {
  context_ = context;
  num_tokens_ = input.num_tokens();
  num_seqs_ = input.num_seqs();
  std::copy(input.token_ids.begin(), input.token_ids.end(), memory_.token_ids);
  plan_sequences(input);
  plan_angles(input, pool);
  plan_query_scales(input);
  plan_appends();
  plan_attention(pool.size());
}

void CpuStepPlan::plan_sequences(const StepInput& input) {
  for (int64_t s = 0; s < num_seqs_; ++s) {
    const auto i = size(s);
    int32_t* table = memory_.block_tables + s * limits_.max_blocks_per_seq;
    std::copy(input.block_tables[i].begin(), input.block_tables[i].end(), table);
    const AttentionScale scale = attention_scale(*input.profiles[i], shape_.head_dim);
    memory_.sequences[s] = {input.cu_seqlens[i],
                            input.cu_seqlens[i + 1] - input.cu_seqlens[i],
                            input.first_position[i],
                            table,
                            static_cast<float>(scale.softmax * std::numbers::log2e),
                            static_cast<float>(scale.rotated)};
  }
}

// The angle position * inv_freq is formed in float64 at multiples of kTurns positions and turned on
// from there by (position % kTurns) * inv_freq in float64, which is within 1e-15 of the sine and
// cosine of the whole angle for a twentieth of the time, and depends on the position alone.
void CpuStepPlan::plan_angles(const StepInput& input, ThreadPool& pool) {
  rotary_pairs_ = static_cast<int64_t>(input.profiles.front()->inv_freq.size());
  const int64_t pairs = rotary_pairs_;
  const int64_t stride = shape_.head_dim / 2;  // of the tables, so that a row is one sequence's
  for (int64_t s = 0; s < num_seqs_; ++s) {
    const std::vector<double>& inv_freq = input.profiles[size(s)]->inv_freq;
    double* known = memory_.inv_freq + s * stride;
    if (std::equal(inv_freq.begin(), inv_freq.end(), known)) continue;
    std::copy(inv_freq.begin(), inv_freq.end(), known);
    double* turn = memory_.turns + s * stride * kTurns * 2;
    for (int64_t i = 0; i < pairs; ++i) {
      for (int64_t j = 0; j < kTurns; ++j) {
        const double angle = static_cast<double>(j) * known[i];
        *turn++ = std::cos(angle);
        *turn++ = std::sin(angle);
      }
    }
  }

  for (int64_t s = 0; s < num_seqs_; ++s) {
    const SequenceStep& sequence = memory_.sequences[s];
    const int64_t first_group = sequence.first_position / kTurns;
    const int64_t end = sequence.first_position + sequence.num_tokens;
    const auto turn_group = [&](int64_t index, int) {
      const int64_t base = (first_group + index) * kTurns;
      const int64_t begin = std::max(base, sequence.first_position);
      const int64_t stop = std::min(base + kTurns, end);
      for (int64_t i = 0; i < pairs; ++i) {
        const double angle = static_cast<double>(base) * memory_.inv_freq[s * stride + i];
        const double c = std::cos(angle);
        const double d = std::sin(angle);
        const double* turn = memory_.turns + (s * stride + i) * kTurns * 2;
        for (int64_t p = begin; p < stop; ++p) {
          const double* t = turn + (p - base) * 2;
          const int64_t row = sequence.first_token + p - sequence.first_position;
          memory_.cos[row * pairs + i] = static_cast<float>(c * t[0] - d * t[1]);
          memory_.sin[row * pairs + i] = static_cast<float>(d * t[0] + c * t[1]);
        }
      }
    };
    pool.parallel_for(ceil_div(end, kTurns) - first_group, turn_group);
  }
}

void CpuStepPlan::plan_query_scales(const StepInput& input) {
  for (int64_t s = 0; s < num_seqs_; ++s) {
    const SequenceStep& sequence = memory_.sequences[s];
    float* scale = memory_.q_scale + sequence.first_token;
    for (int64_t t = 0; t < sequence.num_tokens; ++t) {
      scale[t] = query_scale(*input.profiles[size(s)], sequence.first_position + t + 1);
    }
  }
}

void CpuStepPlan::plan_appends() {
  num_appends_ = 0;
  for (int64_t s = 0; s < num_seqs_; ++s) {
    const SequenceStep& sequence = memory_.sequences[s];
    for (int64_t first = 0; first < sequence.num_tokens;) {
      const int64_t position = sequence.first_position + first;
      const int64_t left_in_tile = kKeyTile - position % kKeyTile;
      const int64_t count = std::min(left_in_tile, sequence.num_tokens - first);
      const int64_t key = context_.has(position) ? context_.keys(position) : -1;
      memory_.appends[num_appends_++] = {s, first, count, key};
      first += count;
    }
  }
}

void CpuStepPlan::plan_attention(int num_threads) {
  const int64_t group = group_of(shape_);
  const auto count_units = [&](int64_t unit_tokens) {
    int64_t count = 0;
    for (int64_t s = 0; s < num_seqs_; ++s) {
      count += ceil_div(memory_.sequences[s].num_tokens, unit_tokens) * shape_.num_kv_heads;
    }
    return count;
  };
  int64_t rows = kMaxUnitRows;
  while (rows > kMinUnitRows &&
         count_units(tokens_of(rows, group)) < kUnitsPerThread * num_threads) {
    rows /= 2;
  }

  num_units_ = num_merges_ = num_partials_ = 0;
  const int64_t slots = split_spans(limits_) * shape_.num_kv_heads;
  for (int64_t s = 0; s < num_seqs_; ++s) {
    const SequenceStep& sequence = memory_.sequences[s];
    const int64_t spans = ceil_div(context_.keys(sequence.first_position + 1), kSpanKeys);
    const bool split = sequence.num_tokens == 1 && spans > 1 &&
                       num_partials_ + spans * shape_.num_kv_heads <= slots;
    split ? add_decode(s) : add_prefill(s, tokens_of(rows, group));
  }
  // Ties keep the order of KV heads, so that threads read the same keys at about the same time.
  std::sort(memory_.units, memory_.units + num_units_,
            [](const AttentionUnit& a, const AttentionUnit& b) {
              if (a.cost != b.cost) return a.cost > b.cost;
              if (a.seq != b.seq) return a.seq < b.seq;
              if (a.kv_head != b.kv_head) return a.kv_head < b.kv_head;
              return a.first != b.first ? a.first < b.first : a.first_span < b.first_span;
            });
}

void CpuStepPlan::add_prefill(int64_t seq, int64_t unit_tokens) {
  const SequenceStep& sequence = memory_.sequences[seq];
  // As many units as needed, of even size: a small last one would read every key for few rows.
  const int64_t even = ceil_div(sequence.num_tokens, ceil_div(sequence.num_tokens, unit_tokens));
  for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
    for (int64_t first = 0; first < sequence.num_tokens; first += even) {
      const int64_t count = std::min(even, sequence.num_tokens - first);
      const int64_t keys = context_.keys(sequence.first_position + first + count);
      const int64_t cost = count * group_of(shape_) * keys;
      memory_.units[num_units_++] = {seq, head, first, count, 0, ceil_div(keys, kSpanKeys),
                                     -1,  cost};
    }
  }
}

void CpuStepPlan::add_decode(int64_t seq) {
  const int64_t keys = context_.keys(memory_.sequences[seq].first_position + 1);
  const int64_t spans = ceil_div(keys, kSpanKeys);
  for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
    memory_.merges[num_merges_++] = {seq, head, num_partials_, spans};
    for (int64_t span = 0; span < spans; ++span) {
      const int64_t cost = group_of(shape_) * std::min(kSpanKeys, keys - span * kSpanKeys);
      memory_.units[num_units_++] = {seq, head, 0, 1, span, span + 1, num_partials_++, cost};
    }
  }
}

}  // namespace longspan::cpu
