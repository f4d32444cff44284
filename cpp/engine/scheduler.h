#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

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
/// one token of every decoding sequence and chunks of prompts as far as the budget goes.
class Scheduler {
 public:
  Scheduler(BlockPool& pool, int64_t block_len, int64_t max_batch_size, int64_t max_prefill_tokens)
      : pool_(pool),
        block_len_(block_len),
        max_batch_size_(max_batch_size),
        max_prefill_tokens_(max_prefill_tokens) {}

  void add(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

  /// Admits what can be, then plans a step; its blocks are in the sequences' tables. Empty when
  /// there is nothing to do.
  std::vector<ScheduledSequence> schedule(const StepCost& cost);

  /// Takes out every sequence that matches, waiting or running, and frees its blocks.
  void remove_if(const std::function<bool(const Sequence&)>& matches);

  bool empty() const { return waiting_.empty() && running_.empty(); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }

 private:
  void admit();

  BlockPool& pool_;
  const int64_t block_len_;
  const int64_t max_batch_size_;
  const int64_t max_prefill_tokens_;
  std::deque<std::unique_ptr<Sequence>> waiting_;   // in order of arrival
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of arrival
};

}  // namespace longspan
