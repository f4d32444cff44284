#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <utility>
#include <vector>

#include "engine/scheduler.h"
#include "engine/step_cost.h"
#include "engine/step_runner.h"

namespace longspan {

/// What steps have done; see EngineMetrics.
struct StepCounts {
  int64_t steps = 0;
  int64_t prefilled_tokens = 0;
  int64_t generated_tokens = 0;
  int64_t prefix_miss_tokens = 0;
};

/// Plans and runs one step after another. Where a device runs behind its host, a step of decodes is
/// planned and queued while the one before still runs: which sequences it has and how long they are
/// is known before their tokens, which it reads on the device. A sequence that turns out to have
/// ended has a token drawn in vain.
class StepLoop {
 public:
  /// reuses_prefixes: the scheduler has a prefix cache. publish: makes counts() and what is free
  /// known; called whenever they have moved.
  StepLoop(Scheduler& scheduler, StepCost& cost, StepRunner& runner, bool reuses_prefixes,
           std::function<void()> publish)
      : scheduler_(scheduler),
        cost_(cost),
        runner_(runner),
        reuses_prefixes_(reuses_prefixes),
        publish_(std::move(publish)) {}

  /// Ends what is cancelled, then queues a step and gives out the tokens of another.
  void turn();
  /// Ends every sequence with an error.
  void fail_all(const std::exception_ptr& error);

  const StepCounts& counts() const { return counts_; }

 private:
  /// Takes out what has finished or is cancelled and is not part of a step under way.
  void remove_ended();
  /// Removes the sequences that `ends` has ended, or has found to be. Their results are out only
  /// when that is published: who has a result finds it counted, and its blocks free.
  void remove_if(const std::function<bool(const Sequence&)>& ends);
  void run(const std::vector<ScheduledSequence>& step);
  /// Gives out the tokens of steps until there are but `most` under way.
  void settle(size_t most);

  Scheduler& scheduler_;
  StepCost& cost_;
  StepRunner& runner_;
  const bool reuses_prefixes_;
  const std::function<void()> publish_;
  StepCounts counts_;
};

}  // namespace longspan
