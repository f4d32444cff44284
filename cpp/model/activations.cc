#include "model/activations.h"

#include "model/row_split.h"

namespace longspan {
namespace {

constexpr int64_t kStrideMultiple = 32;

/// Calls visit(member, rows, cols, dtype) for each matrix; the one list of them.
template <class Visit>
void for_each_matrix(const ActivationShape& s, const BackendSizes& backend, const Visit& visit) {
  const DType act = backend.activation_dtype();
  const DType out = backend.output_dtype();
  const DType acc = backend.accumulator_dtype();
  const int64_t split_rows = RowSplit::capacity(s.tokens, s.ranks);
  visit(&Activations::residual, split_rows, s.hidden, acc);
  visit(&Activations::delta, split_rows, s.hidden, out);
  visit(&Activations::normed, split_rows, s.hidden, act);
  visit(&Activations::qkv, s.tokens, s.qkv, out);
  visit(&Activations::q, s.tokens, s.q, act);
  visit(&Activations::attention, s.tokens, s.q, act);
  if (s.shared_heads > 0) {
    visit(&Activations::log_sum_exp, s.tokens, s.shared_heads, acc);
    visit(&Activations::log_sum_exps, s.tokens, s.ranks * s.shared_heads, acc);
  }
  visit(&Activations::gate_up, s.tokens, 2 * s.inner, out);
  visit(&Activations::inner, s.tokens, s.inner, act);
  visit(&Activations::head_input, s.tokens, s.hidden, act);
  visit(&Activations::logits, s.logit_rows, s.vocab, acc);
  if (s.tokens_of_head < s.vocab) {
    visit(&Activations::own_logits, s.logit_rows, s.tokens_of_head, acc);
  }
}

int64_t stride_of(int64_t cols) {
  return (cols + kStrideMultiple - 1) / kStrideMultiple * kStrideMultiple;
}

}  // namespace

ActivationShape::ActivationShape(const ModelConfig& c, const Shard& shard, int64_t tokens_,
                                 int64_t logit_rows_)
    : tokens(tokens_),
      logit_rows(logit_rows_),
      hidden(c.hidden_size),
      q(shard.q_heads.size() * c.head_dim),
      qkv((shard.q_heads.size() + 2 * shard.kv_heads.size()) * c.head_dim),
      inner(shard.inner.size()),
      vocab(c.vocab_size),
      tokens_of_head(shard.tokens.size()),
      shared_heads(shard.context_size > 1 ? shard.q_heads.size() : 0),
      ranks(shard.tp_size) {}

Activations::Activations(const ActivationShape& shape, Backend& backend) {
  for_each_matrix(shape, backend, [&](auto member, int64_t rows, int64_t cols, DType dtype) {
    const int64_t stride = stride_of(cols);
    buffers_.push_back(backend.allocate(rows * stride * size_of(dtype)));
    this->*member = {buffers_.back().data(), dtype, rows, cols, stride};
  });
  if (own_logits.data == nullptr) own_logits = logits;
}

int64_t Activations::bytes(const ActivationShape& shape, const BackendSizes& backend) {
  int64_t total = 0;
  for_each_matrix(shape, backend, [&](auto, int64_t rows, int64_t cols, DType dtype) {
    total += rows * stride_of(cols) * size_of(dtype);
  });
  return total;
}

}  // namespace longspan
