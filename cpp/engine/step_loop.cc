#include "engine/step_loop.h"

#include <chrono>
#include <memory>

namespace longspan {

void StepLoop::turn() {
  try {
    // A step with prompts takes long; the tokens before it are not to wait for its end.
    if (!scheduler_.has_decodes_only()) settle(0);
    remove_ended();
    const std::vector<ScheduledSequence> step = scheduler_.schedule(cost_);
    if (!step.empty()) run(step);
    settle(step.empty() ? 0 : 1);
  } catch (...) {
    // Planning copies cached blocks, on every rank; whose step it was to be is not known yet.
    fail_all(std::current_exception());
  }
  remove_ended();
}

void StepLoop::remove_ended() {
  remove_if([](const Sequence& sequence) {
    RequestState& state = *sequence.state;
    if (state.cancelled()) state.finish(FinishReason::kCancelled);
    return state.ended() && !sequence.awaits_token();
  });
}

void StepLoop::fail_all(const std::exception_ptr& error) {
  runner_.forget();
  remove_if([&](const Sequence& sequence) {
    sequence.state->fail(error);
    return true;
  });
}

void StepLoop::remove_if(const std::function<bool(const Sequence&)>& ends) {
  std::vector<std::shared_ptr<RequestState>> ended;
  scheduler_.remove_if([&](const Sequence& sequence) {
    if (!ends(sequence)) return false;
    ended.push_back(sequence.state);
    return true;
  });
  publish_();
  for (const auto& state : ended) state->hand_out();
}

void StepLoop::run(const std::vector<ScheduledSequence>& step) {
  double flops = 0.0;
  StepCounts gained;
  for (const auto& [sequence, count] : step) {
    flops += cost_.flops(count, sequence->num_computed);
    (sequence->in_prefill() ? gained.prefilled_tokens : gained.generated_tokens) += count;
    if (reuses_prefixes_ && sequence->in_prefill() && !sequence->state->scores_prompt()) {
      gained.prefix_miss_tokens += count;
    }
  }
  const auto begin = std::chrono::steady_clock::now();
  try {
    if (!runner_.start(step)) return;
  } catch (...) {
    // What a step throws is nobody's fault in particular; only its own requests end.
    for (const auto& part : step) part.sequence->state->fail(std::current_exception());
    return;
  }
  ++counts_.steps;
  counts_.prefilled_tokens += gained.prefilled_tokens;
  counts_.generated_tokens += gained.generated_tokens;
  counts_.prefix_miss_tokens += gained.prefix_miss_tokens;
  if (runner_.can_wait()) return;
  settle(0);
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
  // What decodes reach is the rate of memory.
  if (gained.prefilled_tokens > 0) cost_.measured(flops, spent.count());
}

void StepLoop::settle(size_t most) {
  while (runner_.num_under_way() > most) scheduler_.publish(runner_.finish());
}

}  // namespace longspan
