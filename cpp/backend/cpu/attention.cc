#include "backend/cpu/attention.h"

#include "backend/cpu/attention_task.h"
#include "backend/cpu/kv_tiles.h"

namespace longspan::cpu {

void attention(const Kernels& kernels, ThreadPool& pool, const CpuStepPlan& plan, int64_t layer,
               const MatrixView& q, const KvCache& cache, const MatrixView& out,
               const MatrixView* log_sum_exp) {
  const AttentionShape& shape = plan.shape();
  const KvTiles tiles(cache.shape, q.dtype);
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  const auto head_row = [&](const MatrixView& m, int64_t token, int64_t kv_head) {
    return m.rows_from(token, 1).row<char>(0) + kv_head * group * shape.head_dim * size_of(m.dtype);
  };
  const auto sums_of = [&](int64_t token, int64_t kv_head) {
    return log_sum_exp == nullptr ? nullptr : log_sum_exp->row<float>(token) + kv_head * group;
  };

  const auto units = plan.attention_units();
  const auto attend = [&](int64_t index, int thread) {
    const AttentionUnit& unit = units[static_cast<size_t>(index)];
    const SequenceStep& sequence = plan.sequence(unit.seq);
    const int64_t token = sequence.first_token + unit.first;
    AttentionTask task;
    task.group = group;
    task.head_dim = shape.head_dim;
    task.num_tokens = unit.count;
    task.first_position = sequence.first_position + unit.first;
    task.context = plan.context();
    task.first_span = unit.first_span;
    task.end_span = unit.end_span;
    task.scale_log2 = sequence.scale_log2;
    task.tiles = &tiles;
    task.pool = cache.pool.as<const char>();
    task.block_table = sequence.block_table;
    task.layer = layer;
    task.kv_head = unit.kv_head;
    task.q = head_row(q, token, unit.kv_head);
    task.q_stride = q.stride;
    task.out = head_row(out, token, unit.kv_head);
    task.out_stride = out.stride;
    task.log_sum_exp = sums_of(token, unit.kv_head);
    task.log_sum_exp_stride = log_sum_exp == nullptr ? 0 : log_sum_exp->stride;
    task.partial = unit.partial < 0 ? nullptr : plan.partial(unit.partial);
    task.scratch = plan.scratch(thread);
    kernels.attend(task);
  };
  pool.parallel_for(static_cast<int64_t>(units.size()), attend);

  const auto merges = plan.merge_units();
  const auto merge = [&](int64_t index, int thread) {
    const MergeUnit& unit = merges[static_cast<size_t>(index)];
    MergeTask task;
    task.group = group;
    task.head_dim = shape.head_dim;
    task.num_spans = unit.num_spans;
    task.partials = plan.partial(unit.first_partial);
    const int64_t token = plan.sequence(unit.seq).first_token;
    task.out = head_row(out, token, unit.kv_head);
    task.log_sum_exp = sums_of(token, unit.kv_head);
    task.scratch = plan.scratch(thread);
    kernels.merge_spans(task);
  };
  pool.parallel_for(static_cast<int64_t>(merges.size()), merge);
}

}  // namespace longspan::cpu
