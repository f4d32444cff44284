#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace longspan {

void Scheduler::admit() {
  while (!waiting_.empty() && num_running() < max_batch_size_) {
    Sequence& next = *waiting_.front();
    std::optional<BlockTable> blocks =
        BlockTable::reserve(pool_, block_len_, next.state->lengths.total());
    if (!blocks) return;  // later arrivals wait behind it, or a long request might never start
    next.blocks.emplace(std::move(*blocks));
    next.state->start();
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

std::vector<ScheduledSequence> Scheduler::schedule(const StepCost& cost) {
  admit();
  std::vector<ScheduledSequence> step;
  int64_t budget = max_prefill_tokens_;
  for (const auto& sequence : running_) {
    int64_t tokens = 1;
    if (sequence->in_prefill()) {
      const int64_t wanted =
          std::min(sequence->state->lengths.prompt - sequence->num_computed, budget);
      if (wanted == 0) continue;
      tokens = cost.fitting_tokens(wanted, sequence->num_computed);
      // Fewer than wanted fill the step's time; a later prompt in it would overrun.
      budget = tokens < wanted ? 0 : budget - tokens;
    }
    sequence->blocks->grow_to(sequence->num_computed + tokens);
    step.push_back({sequence.get(), tokens});
  }
  return step;
}

void Scheduler::remove_if(const std::function<bool(const Sequence&)>& matches) {
  const auto gone = [&](const std::unique_ptr<Sequence>& sequence) { return matches(*sequence); };
  std::erase_if(waiting_, gone);
  std::erase_if(running_, gone);
}

}  // namespace longspan
