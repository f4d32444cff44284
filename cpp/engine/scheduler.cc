#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace longspan {

void Scheduler::admit(const StepCost& cost) {
  while (!waiting_.empty() && num_running() < max_batch_size_) {
    Sequence& next = *waiting_.front();
    std::vector<int32_t> shared;
    if (prefix_cache_ != nullptr) shared = prefix_cache_->match(next);
    std::optional<BlockTable> blocks =
        BlockTable::reserve(pool_, block_len_, next.state->lengths.total(), shared);
    if (!blocks) return;  // later arrivals wait behind it, or a long request might never start
    next.blocks.emplace(std::move(*blocks));
    next.num_published = std::ssize(shared);
    next.num_computed = next.num_published * block_len_;
    next.state->start();
    count_hit(next, 0, cost);
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

void Scheduler::count_hit(const Sequence& sequence, int64_t from, const StepCost& cost) {
  const int64_t tokens = sequence.num_computed - from;
  if (tokens == 0) return;
  num_hit_tokens_ += tokens;
  sequence.state->skip_prefill(
      tokens, cost.flops(tokens, from) / cost.flops(sequence.state->lengths.prompt, 0));
}

bool Scheduler::reuse(Sequence& sequence, const std::vector<ScheduledSequence>& step,
                      const StepCost& cost) {
  if (prefix_cache_ == nullptr) return true;
  const int64_t from = sequence.num_computed;
  prefix_cache_->reuse_whole(sequence);
  const bool waits = std::any_of(step.begin(), step.end(), [&](const ScheduledSequence& other) {
    return prefix_cache_->will_fill_next_block_of(sequence, *other.sequence, other.num_tokens);
  });
  if (!waits) prefix_cache_->reuse_part(sequence);
  count_hit(sequence, from, cost);
  return !waits;
}

std::vector<Sequence*> Scheduler::prefilling() const {
  std::vector<Sequence*> all;
  for (const auto& sequence : running_) {
    if (sequence->in_prefill()) all.push_back(sequence.get());
  }
  if (!all.empty()) {
    std::stable_sort(all.begin() + 1, all.end(), [](const Sequence* a, const Sequence* b) {
      return a->rest_of_prefill() < b->rest_of_prefill();
    });
  }
  return all;
}

std::vector<ScheduledSequence> Scheduler::schedule(const StepCost& cost) {
  admit(cost);
  std::vector<ScheduledSequence> step;
  const auto add = [&](Sequence& sequence, int64_t tokens) {
    sequence.blocks->grow_to(sequence.num_computed + tokens);
    step.push_back({&sequence, tokens});
  };
  for (const auto& sequence : running_) {
    if (!sequence->in_prefill() && sequence->goes_on()) add(*sequence, 1);
  }
  const std::vector<Sequence*> prompts = prefilling();
  // The oldest leaves half a step to shorter ones, which so never wait for its end.
  const bool shared =
      prompts.size() > 1 && prompts[1]->rest_of_prefill() < prompts[0]->rest_of_prefill();
  const double share = shared ? 0.5 : 1.0;  // of the step's time, for each
  int64_t budget = max_prefill_tokens_;
  for (Sequence* sequence : prompts) {
    if (budget == 0) break;
    if (!reuse(*sequence, step, cost)) continue;
    const bool leaves_half = shared && sequence == prompts.front();
    const int64_t wanted =
        std::min(sequence->rest_of_prefill(), leaves_half ? (budget + 1) / 2 : budget);
    const int64_t tokens = cost.fitting_tokens(wanted, sequence->num_computed, share);
    // Fewer than wanted fill the time; a later prompt in it would overrun.
    budget = tokens < wanted && !leaves_half ? 0 : budget - tokens;
    add(*sequence, tokens);
  }
  return step;
}

bool Scheduler::has_decodes_only() const {
  return (waiting_.empty() || num_running() == max_batch_size_) &&
         std::none_of(running_.begin(), running_.end(),
                      [](const auto& sequence) { return sequence->in_prefill(); });
}

void Scheduler::publish(const std::vector<ScheduledSequence>& step) {
  if (prefix_cache_ == nullptr) return;
  for (const ScheduledSequence& part : step) {
    if (!part.sequence->state->failed()) prefix_cache_->publish(*part.sequence);
  }
}

void Scheduler::remove_if(const std::function<bool(const Sequence&)>& matches) {
  const auto gone = [&](const std::unique_ptr<Sequence>& sequence) {
    if (!matches(*sequence)) return false;
    // What a failed sequence has cached may be no numbers.
    if (prefix_cache_ != nullptr && sequence->blocks && !sequence->state->failed()) {
      prefix_cache_->retire(*sequence);
    }
    return true;
  };
  std::erase_if(waiting_, gone);
  std::erase_if(running_, gone);
}

}  // namespace longspan
