#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "engine/prefix_cache.h"
#include "engine/sequence.h"
#include "engine/step_cost.h"
#include "kv/block_pool.h"

namespace longspan {

/// A sequence's part of a step: its next num_tokens tokens.
struct ScheduledSequence {
  Sequence* sequence = nullptr;
  int64_t num_tokens = 0;
};

/// Decides what each step runs: first come, first served. A sequence is admitted when the pool can
/// promise all the blocks it may ever need, so that nothing running is ever preempted. A step holds
/// one token of every decoding sequence and chunks of prompts as far as the budget goes: first the
/// oldest prompt, which leaves half of a step to shorter ones, then the others, shortest rest
/// first. With a prefix cache a prompt skips what others have computed, and waits a step for a
/// block that an earlier one is computing in it.
class Scheduler {
 public:
  /// prefix_cache: of the same pool, or null.
  Scheduler(BlockPool& pool, PrefixCache* prefix_cache, int64_t block_len, int64_t max_batch_size,
            int64_t max_prefill_tokens)
      : pool_(pool),
        prefix_cache_(prefix_cache),
        block_len_(block_len),
        max_batch_size_(max_batch_size),
        max_prefill_tokens_(max_prefill_tokens) {}

  void add(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

  /// Admits what can be, then plans a step; its blocks are in the sequences' tables. Empty when
  /// there is nothing to do.
  std::vector<ScheduledSequence> schedule(const StepCost& cost);

  /// Whether the next step has no prompt in it and admits none.
  bool has_decodes_only() const;

  /// After a step, which moved its sequences: what it computed may be shared.
  void publish(const std::vector<ScheduledSequence>& step);

  /// Takes out every sequence that matches, waiting or running, and frees its blocks.
  void remove_if(const std::function<bool(const Sequence&)>& matches);

  bool empty() const { return waiting_.empty() && running_.empty(); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  /// Prompt tokens that were not computed because the prefix cache had them.
  int64_t num_hit_tokens() const { return num_hit_tokens_; }

 private:
  void admit(const StepCost& cost);
  /// Running sequences with prompt tokens left: the oldest, then those of the shortest rest.
  std::vector<Sequence*> prefilling() const;
  /// Moves a prompt on over what is cached; false when it should wait for others of the step.
  bool reuse(Sequence& sequence, const std::vector<ScheduledSequence>& step, const StepCost& cost);
  /// Accounts for tokens of a prompt, from position `from` on, that were found in the cache.
  void count_hit(const Sequence& sequence, int64_t from, const StepCost& cost);

  BlockPool& pool_;
  PrefixCache* const prefix_cache_;
  const int64_t block_len_;
  const int64_t max_batch_size_;
  const int64_t max_prefill_tokens_;
  int64_t num_hit_tokens_ = 0;
  std::deque<std::unique_ptr<Sequence>> waiting_;   // in order of arrival
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of arrival
};

}  // namespace longspan
