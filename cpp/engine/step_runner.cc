#include "engine/step_runner.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <utility>

#include "core/check.h"

namespace longspan {
namespace {

StepInput make_input(const std::vector<ScheduledSequence>& step) {
  StepInput input;
  input.cu_seqlens.push_back(0);
  for (const auto& [sequence, count] : step) {
    const auto first = sequence->tokens.begin() + sequence->num_computed;
    input.token_ids.insert(input.token_ids.end(), first, first + count);
    input.cu_seqlens.push_back(input.num_tokens());
    input.first_position.push_back(sequence->num_computed);
    input.block_tables.push_back(sequence->blocks->blocks());
    input.profiles.push_back(sequence->state->profile);
  }
  return input;
}

/// Whether a request asks for any row of its part of the step.
bool wants_rows(const ScheduledSequence& part) {
  const Sequence& sequence = *part.sequence;
  const Request& request = sequence.state->request;
  const int64_t first = sequence.num_computed;
  const int64_t end = first + part.num_tokens;
  if (request.token_nll && sequence.in_prefill()) return true;
  switch (request.kind) {
    case RequestKind::kScore:
      return true;
    case RequestKind::kLogits:
      return std::any_of(request.logit_positions.begin(), request.logit_positions.end(),
                         [&](int64_t position) { return position >= first && position < end; });
    case RequestKind::kGenerate:
      break;
  }
  return end == sequence.num_tokens() && sequence.state->lengths.max_new_tokens > 0;
}

/// Whether a part of a step is a decode whose token the host need not know for the next one.
bool is_plain_decode(const ScheduledSequence& part) {
  const GenerationConfig& g = part.sequence->state->request.generation;
  return !part.sequence->in_prefill() && !g.logprobs && !LogitEdits::needed(g);
}

std::exception_ptr not_finite(const char* what) {
  return std::make_exception_ptr(
      NumericalError(message(what, ": expected finite values, got NaN or infinity")));
}

}  // namespace

StepRunner::StepRunner(const ModelConfig& config, RankGroup& ranks, int64_t max_logit_rows,
                       bool runs_behind, std::function<bool()> closing)
    : config_(config),
      ranks_(ranks),
      max_logit_rows_(max_logit_rows),
      closing_(std::move(closing)),
      work_(config),
      runs_behind_(runs_behind) {}

void StepRunner::report_layer(const std::vector<ScheduledSequence>& step,
                              int64_t layers_done) const {
  for (const auto& [sequence, count] : step) {
    if (!sequence->in_prefill()) continue;
    const int64_t tokens = sequence->num_computed + count * layers_done / config_.num_layers;
    const double done = work_.flops(tokens, 0) / work_.flops(sequence->state->lengths.prompt, 0);
    // The whole prompt counts as done only when its step's results are out.
    sequence->state->set_prefill(std::min(tokens, sequence->state->lengths.prompt - 1), done);
  }
}

bool StepRunner::forward(const std::vector<ScheduledSequence>& step) {
  int64_t total = 0;
  for (const ScheduledSequence& part : step) total += part.num_tokens;
  const bool cache_only = std::none_of(step.begin(), step.end(), wants_rows);
  return ranks_.forward(make_input(step), cache_only, [&](int64_t layers_done) {
    if (closing_()) return false;
    int64_t cancelled = 0;
    for (const auto& [sequence, count] : step) {
      if (sequence->state->cancelled()) cancelled += count;
    }
    // A step that is mostly for nothing is abandoned; otherwise the others' work goes on.
    if (2 * cancelled >= total) return false;
    report_layer(step, layers_done);
    return true;
  });
}

bool StepRunner::start(const std::vector<ScheduledSequence>& step) {
  can_wait_ = runs_behind_ && std::all_of(step.begin(), step.end(), is_plain_decode);
  if (!forward(step)) return false;
  UnderWay under_way;
  under_way.step = step;
  std::vector<LogitRow>& to_sample = under_way.rows;
  std::vector<LogitRow> to_copy;
  int64_t row = 0;  // first of the sequence at hand
  for (const auto& [sequence, count] : step) {
    RequestState& state = *sequence->state;
    const int64_t first = sequence->num_computed;
    const bool was_prefill = sequence->in_prefill();
    sequence->num_computed += count;
    switch (state.request.kind) {
      case RequestKind::kScore:
        score(*sequence, row, first, count);
        break;
      case RequestKind::kLogits:
        for (const int64_t position : state.request.logit_positions) {
          if (position >= first && position < first + count) {
            to_copy.push_back({sequence, row + position - first});
          }
        }
        break;
      case RequestKind::kGenerate:
        if (was_prefill && state.request.token_nll) score(*sequence, row, first, count);
        if (state.ended()) break;  // its scores were not finite
        if (!sequence->in_prefill() && state.lengths.max_new_tokens > 0) {
          to_sample.push_back({sequence, row + count - 1, was_prefill});
        }
        break;
    }
    // A prefill that a token follows ends with that token: a device may be behind until then.
    const bool awaits_token = !to_sample.empty() && to_sample.back().sequence == sequence;
    if (was_prefill && !awaits_token) {
      state.set_prefill(sequence->num_computed, work_.flops(sequence->num_computed, 0) /
                                                    work_.flops(state.lengths.prompt, 0));
    }
    row += count;
  }
  copy_logits(to_copy);
  draw(under_way);
  for (const ScheduledSequence& part : step) {
    const Sequence& sequence = *part.sequence;
    if (!sequence.in_prefill() && sequence.state->lengths.max_new_tokens == 0) {
      sequence.state->finish(sequence.state->lengths.clamped ? FinishReason::kContextFull
                                                             : FinishReason::kLength);
    }
  }
  under_way_.push_back(std::move(under_way));
  return true;
}

std::vector<ScheduledSequence> StepRunner::finish() {
  UnderWay done = std::move(under_way_.front());
  under_way_.pop_front();
  try {
    give_out(done);
  } catch (...) {
    for (const ScheduledSequence& part : done.step) {
      part.sequence->state->fail(std::current_exception());
    }
  }
  for (const LogitRow& row : done.rows) --row.sequence->num_awaited;
  return std::move(done.step);
}

void StepRunner::score(Sequence& sequence, int64_t first_row, int64_t first_position,
                       int64_t count) {
  // The last token of the prompt predicts nothing that could be scored.
  const int64_t scored = std::min(count, sequence.state->lengths.prompt - 1 - first_position);
  if (scored <= 0) return;
  std::vector<int64_t> rows;
  std::vector<int32_t> targets;
  for (int64_t i = 0; i < scored; ++i) {
    rows.push_back(first_row + i);
    targets.push_back(sequence.tokens[static_cast<size_t>(first_position + i + 1)]);
  }
  std::vector<double> nll(rows.size());
  ranks_.negative_log_likelihood(rows, targets, nll);
  if (std::all_of(nll.begin(), nll.end(), [](double value) { return std::isfinite(value); })) {
    sequence.state->add_nll(nll);
  } else {
    sequence.state->fail(not_finite("score"));
  }
}

void StepRunner::copy_logits(const std::vector<LogitRow>& rows) {
  std::vector<float> host(static_cast<size_t>(config_.vocab_size));
  const auto most = static_cast<size_t>(max_logit_rows_);
  for (size_t begin = 0; begin < rows.size(); begin += most) {
    std::vector<int64_t> indices;
    for (size_t i = begin; i < std::min(rows.size(), begin + most); ++i) {
      indices.push_back(rows[i].row);
    }
    const MatrixView logits = ranks_.logits(indices);
    for (size_t i = 0; i < indices.size(); ++i) {
      ranks_.backend().download(logits.rows_from(static_cast<int64_t>(i), 1), host.data());
      rows[begin + i].sequence->state->add_logits(host.data(), config_.vocab_size);
    }
  }
}

void StepRunner::draw(UnderWay& step) {
  std::vector<LogitRow>& rows = step.rows;
  if (rows.empty()) return;
  // Those whose log probabilities are asked for share a pass.
  std::stable_partition(rows.begin(), rows.end(), [](const LogitRow& row) {
    return row.sequence->state->request.generation.logprobs.has_value();
  });
  std::vector<int64_t> indices;
  std::vector<SamplerRow> samplers;
  for (auto& [sequence, row, ends_prefill, position] : rows) {
    position = sequence->num_tokens();
    const GenerationConfig& g = sequence->state->request.generation;
    if (!sequence->edits && LogitEdits::needed(g)) {
      sequence->edits.emplace(g, sequence->state->request.input_ids, config_.eos_token_ids);
    }
    indices.push_back(row);
    samplers.push_back({.greedy = !g.do_sample,
                        .temperature = static_cast<float>(g.temperature),
                        .top_k = g.top_k,
                        .top_p = static_cast<float>(g.top_p),
                        .min_p = static_cast<float>(g.min_p),
                        .seed = sequence->state->seed,
                        .position = position,
                        .edits = sequence->edits ? sequence->edits->next(sequence->tokens)
                                                 : std::span<LogitEdit>{}});
  }
  step.logits = ranks_.logits(indices);
  step.draw = ranks_.backend().start_sample(step.logits, samplers);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].sequence->tokens.push_back(drawn_token(static_cast<int64_t>(i)));
    ++rows[i].sequence->num_awaited;
  }
}

void StepRunner::give_out(const UnderWay& step) {
  const std::vector<LogitRow>& rows = step.rows;
  if (rows.empty()) return;
  std::vector<int32_t> tokens(rows.size());
  ranks_.backend().sampled(step.draw, tokens);
  for (const LogitRow& row : rows) {
    if (row.ends_prefill) row.sequence->state->set_prefill(row.sequence->num_computed, 1.0);
  }
  const auto with_logprobs =
      static_cast<size_t>(std::count_if(rows.begin(), rows.end(), [](const LogitRow& row) {
        return row.sequence->state->request.generation.logprobs.has_value();
      }));
  const std::vector<TokenLogprob> logprobs =
      log_probabilities(step.logits, {rows.data(), with_logprobs}, tokens);
  const size_t each = with_logprobs > 0 ? logprobs.size() / with_logprobs : 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto own = std::span(logprobs).subspan(i < with_logprobs ? i * each : 0);
    deliver(rows[i], tokens[i], own);
  }
}

std::vector<TokenLogprob> StepRunner::log_probabilities(const MatrixView& logits,
                                                        std::span<const LogitRow> rows,
                                                        std::span<const int32_t> tokens) const {
  if (rows.empty()) return {};
  int32_t top = 0;
  for (const LogitRow& row : rows) {
    top = std::max(top, *row.sequence->state->request.generation.logprobs);
  }
  std::vector<int32_t> drawn;  // a token of a row that is not finite is not delivered
  drawn.reserve(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) drawn.push_back(std::max(tokens[i], 0));
  std::vector<TokenLogprob> result(rows.size() * static_cast<size_t>(1 + top));
  ranks_.backend().log_probabilities(logits.rows_from(0, std::ssize(rows)), drawn, top, result);
  return result;
}

void StepRunner::deliver(const LogitRow& row, int32_t token,
                         std::span<const TokenLogprob> logprobs) const {
  Sequence& sequence = *row.sequence;
  RequestState& state = *sequence.state;
  // Of a sequence that has ended: what it was to go on with, and had computed of that.
  const auto drop = [&] {
    if (sequence.num_tokens() > row.position) {
      sequence.tokens.resize(static_cast<size_t>(row.position));
    }
    sequence.num_computed = std::min(sequence.num_computed, row.position);
  };
  if (state.ended()) return drop();
  if (token < 0) return state.fail(not_finite("logits"));
  const GenerationConfig& g = state.request.generation;
  const auto in = [token](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  if (in(g.stop_token_ids) || (!g.ignore_eos && in(config_.eos_token_ids))) {
    drop();
    return state.finish(FinishReason::kStop, token);
  }
  sequence.tokens[static_cast<size_t>(row.position)] = token;
  state.add_token(token, logprobs.first(g.logprobs ? static_cast<size_t>(*g.logprobs) + 1 : 0));
  if (row.position + 1 == state.lengths.total()) {
    state.finish(state.lengths.clamped ? FinishReason::kContextFull : FinishReason::kLength);
  }
}

}  // namespace longspan
