#include "model/decoder.h"

#include <utility>
#include <vector>

#include "model/row_split.h"

namespace longspan {
namespace {

AttentionShape attention_shape(const ModelConfig& config, const Shard& shard) {
  return {shard.q_heads.size(), shard.kv_heads.size(), config.head_dim};
}

ActivationShape activation_shape(const ModelConfig& config, const Shard& shard,
                                 const DecoderLimits& limits) {
  return {config, shard, limits.step.max_tokens, limits.max_logit_rows};
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const Shard& shard, Backend& backend,
                 Communicator& communicator, DecoderWeights weights, const DecoderLimits& limits)
    : config_(config),
      shard_(shard),
      backend_(backend),
      communicator_(communicator),
      weights_(std::move(weights)),
      limits_(limits),
      plan_(backend.make_step_plan(limits.step, attention_shape(config, shard_))),
      activations_(activation_shape(config, shard_, limits), backend) {}

bool Decoder::forward(const StepInput& input, const KvCache& cache, bool cache_only,
                      const LayerCallback& after_layer) {
  const int64_t tokens = input.num_tokens();
  backend_.plan_step(*plan_, input, cache);
  const auto whole = [&] { run_layers(tokens, cache, false, [](int64_t) { return true; }); };
  // What ranks say to each other between layers cannot be repeated without them.
  if (!cache_only && communicator_.size() == 1 && backend_.run_whole(*plan_, whole)) {
    return after_layer(config_.num_layers);
  }
  return run_layers(tokens, cache, cache_only, after_layer);
}

bool Decoder::run_layers(int64_t tokens, const KvCache& cache, bool cache_only,
                         const LayerCallback& after_layer) {
  const auto rows = [tokens](const MatrixView& m) { return m.rows_from(0, tokens); };
  const MatrixView delta = rows(activations_.delta);
  const MatrixView normed = rows(activations_.normed);
  const MatrixView qkv = rows(activations_.qkv);
  const MatrixView q = rows(activations_.q);
  const MatrixView attention = rows(activations_.attention);
  const MatrixView gate_up = rows(activations_.gate_up);
  const MatrixView inner = rows(activations_.inner);
  const auto eps = static_cast<float>(config_.rms_norm_eps);

  const RowSplit split(communicator_, tokens);
  const MatrixView own_residual = split.own(activations_.residual);
  const MatrixView own_delta = split.own(activations_.delta);
  const auto add_and_norm = [&](const MatrixView* block, const Buffer& weight) {
    if (own_residual.rows > 0) {
      backend_.rms_norm(block, own_residual, weight, eps, split.own(activations_.normed));
    }
    split.gather(activations_.normed);
  };

  backend_.embedding(*plan_, *weights_.embedding, first_token(), rows(activations_.residual));
  split.sum(activations_.residual);     // each token's row is with one rank, zero elsewhere
  const MatrixView* pending = nullptr;  // a block's output, added by the norm that follows
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[static_cast<size_t>(i)];
    add_and_norm(pending, layer.input_norm);
    layer.qkv->forward(backend_, normed, qkv);
    const QkNorm norm{layer.q_norm, layer.k_norm, eps};
    backend_.rotate_append(*plan_, i, qkv, config_.qk_norm ? &norm : nullptr, cache, q);
    if (cache_only && i + 1 == config_.num_layers) return after_layer(i + 1);
    attend(i, q, cache, attention);
    layer.o->forward(backend_, attention, delta);
    split.sum(activations_.delta);
    add_and_norm(&own_delta, layer.post_attention_norm);
    layer.gate_up->forward_silu_mul(backend_, normed, gate_up, inner);
    layer.down->forward(backend_, inner, delta);
    split.sum(activations_.delta);
    pending = &own_delta;
    backend_.end_layer(*plan_);
    if (!after_layer(i + 1)) return false;
  }
  add_and_norm(pending, weights_.final_norm);
  return true;
}

void Decoder::attend(int64_t layer, const MatrixView& q, const KvCache& cache,
                     const MatrixView& out) {
  if (shard_.context_size == 1) {
    backend_.attention(*plan_, layer, q, cache, out, nullptr);
    return;
  }
  // Of softmax over all keys, sum exp(s) v / sum exp(s), each rank has its keys' part of both sums;
  // the row-parallel linear that follows adds up what each makes of the first.
  const MatrixView mine = activations_.log_sum_exp.rows_from(0, q.rows);
  const MatrixView all = activations_.log_sum_exps.rows_from(0, q.rows);
  backend_.attention(*plan_, layer, q, cache, out, &mine);
  communicator_.all_gather(mine, all);
  const int64_t heads = shard_.q_heads.size();
  const int first = shard_.tp_rank - shard_.context_rank;  // of those with the same heads
  backend_.weigh_partial_attention(all.cols_from(first * heads, shard_.context_size * heads),
                                   shard_.context_rank, heads, out);
}

MatrixView Decoder::gather_head_input(std::span<const int64_t> rows) {
  const auto count = static_cast<int64_t>(rows.size());
  // Most decode steps ask for all of their rows, in order.
  int64_t in_place = 0;
  while (in_place < count && rows[static_cast<size_t>(in_place)] == in_place) ++in_place;
  if (in_place == count) return activations_.normed.rows_from(0, count);
  const MatrixView input = activations_.head_input.rows_from(0, count);
  backend_.gather_rows(activations_.normed, rows, input);
  return input;
}

MatrixView Decoder::logits(std::span<const int64_t> rows) {
  const MatrixView input = gather_head_input(rows);
  const MatrixView mine = activations_.own_logits.rows_from(0, input.rows);
  const MatrixView all = activations_.logits.rows_from(0, input.rows);
  backend_.linear(input, weights_.head(), mine);
  communicator_.all_gather(mine, all);
  return all;
}

void Decoder::negative_log_likelihood(std::span<const int64_t> rows,
                                      std::span<const int32_t> targets, std::span<double> nll) {
  std::vector<PartialScore> mine(rows.size());
  backend_.score(gather_head_input(rows), weights_.head(), first_token(), targets,
                 activations_.own_logits, mine);
  const auto ranks = static_cast<size_t>(communicator_.size());
  std::vector<PartialScore> all(ranks * rows.size());  // [ranks][rows]
  communicator_.all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)));
  std::vector<PartialScore> parts(ranks);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t r = 0; r < ranks; ++r) parts[r] = all[r * rows.size() + i];
    nll[i] = longspan::negative_log_likelihood(parts);
  }
}

int64_t Decoder::activation_bytes(const ModelConfig& config, const BackendSizes& backend,
                                  const Shard& shard, const DecoderLimits& limits) {
  return Activations::bytes(activation_shape(config, shard, limits), backend);
}

int64_t Decoder::plan_bytes(const ModelConfig& config, const BackendSizes& backend,
                            const Shard& shard, const DecoderLimits& limits) {
  return backend.step_plan_bytes(limits.step, attention_shape(config, shard));
}

}  // namespace longspan
