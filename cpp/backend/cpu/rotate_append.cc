#include "backend/cpu/rotate_append.h"

#include "backend/cpu/kv_tiles.h"
#include "backend/cpu/rotate_task.h"

namespace longspan::cpu {

void rotate_append(const Kernels& kernels, ThreadPool& pool, const CpuStepPlan& plan, int64_t layer,
                   const MatrixView& qkv, const QkNorm* norm, const KvCache& cache,
                   const MatrixView& q_out) {
  const AttentionShape& shape = plan.shape();
  const int64_t d = shape.head_dim;
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  const KvTiles tiles(cache.shape, q_out.dtype);
  const auto units = plan.append_units();
  const auto append = [&](int64_t index, int thread) {
    const AppendUnit& unit = units[static_cast<size_t>(index / shape.num_kv_heads)];
    const int64_t head = index % shape.num_kv_heads;
    const SequenceStep& sequence = plan.sequence(unit.seq);
    const int64_t token = sequence.first_token + unit.first;
    RotateTask task;
    task.count = unit.count;
    task.group = group;
    task.head_dim = d;
    task.rotary_pairs = plan.rotary_pairs();
    task.q_scale = plan.q_scale(token);
    task.rotated_scale = sequence.rotated_scale;
    task.cos = plan.cos(token);
    task.sin = plan.sin(token);
    task.q = qkv.row<const float>(token) + head * group * d;
    task.k = qkv.row<const float>(token) + (shape.num_heads + head) * d;
    task.v = task.k + shape.num_kv_heads * d;
    task.stride = qkv.stride;
    if (norm != nullptr) {
      task.q_norm = norm->q.as<const float>();
      task.k_norm = norm->k.as<const float>();
      task.norm_eps = norm->eps;
    }
    task.q_out =
        q_out.rows_from(token, unit.count).row<char>(0) + head * group * d * size_of(q_out.dtype);
    task.q_stride = q_out.stride;
    task.tiles = &tiles;
    task.turn_heads = turns_heads(cache.shape.format);
    if (unit.key >= 0) {
      char* pool_data = cache.pool.as<char>();
      const int64_t tile = unit.key / kKeyTile;
      task.first_key = unit.key % kKeyTile;
      task.k_tile = pool_data + tiles.k_offset(sequence.block_table, tile, layer, head);
      task.v_tile = pool_data + tiles.v_offset(sequence.block_table, tile, layer, head);
    }
    task.scratch = reinterpret_cast<float*>(plan.scratch(thread));
    kernels.rotate_append(task);
  };
  pool.parallel_for(static_cast<int64_t>(units.size()) * shape.num_kv_heads, append);
}

}  // namespace longspan::cpu
