#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <vector>

namespace longspan {
namespace {

ModelConfig tiny() {
  ModelConfig c;
  c.num_layers = c.hidden_size = c.intermediate_size = 1;
  c.num_heads = c.num_kv_heads = c.head_dim = 1;
  return c;
}

std::unique_ptr<Sequence> sequence_of(int64_t prompt, int64_t max_new_tokens) {
  Request request;
  request.input_ids.assign(static_cast<size_t>(prompt), 0);
  RequestLengths lengths;
  lengths.prompt = prompt;
  lengths.max_new_tokens = max_new_tokens;
  return std::make_unique<Sequence>(
      std::make_shared<RequestState>(std::move(request), lengths, RopeProfile{}, 0));
}

std::vector<int64_t> tokens_of(const std::vector<ScheduledSequence>& step) {
  std::vector<int64_t> tokens;
  for (const ScheduledSequence& part : step) tokens.push_back(part.num_tokens);
  return tokens;
}

/// What the step runner does to the sequences, without a model.
void advance(const std::vector<ScheduledSequence>& step) {
  for (const auto& [sequence, count] : step) {
    sequence->num_computed += count;
    if (!sequence->in_prefill()) sequence->tokens.push_back(0);
  }
}

using Tokens = std::vector<int64_t>;

TEST(Scheduler, MixesDecodesWithChunksOfPrefill) {
  BlockPool pool(100);
  Scheduler scheduler(pool, nullptr, 64, 8, 100);
  const StepCost cost(tiny(), 5e10);
  scheduler.add(sequence_of(30, 5));
  scheduler.add(sequence_of(250, 5));
  auto step = scheduler.schedule(cost);
  EXPECT_EQ(tokens_of(step), (Tokens{30, 70}));
  advance(step);
  step = scheduler.schedule(cost);
  EXPECT_EQ(tokens_of(step), (Tokens{1, 100}));
  advance(step);
  step = scheduler.schedule(cost);
  EXPECT_EQ(tokens_of(step), (Tokens{1, 80}));
  advance(step);
  EXPECT_EQ(tokens_of(scheduler.schedule(cost)), (Tokens{1, 1}));
}

TEST(Scheduler, AShortPromptDoesNotWaitForTheEndOfALongOne) {
  BlockPool pool(1000);
  Scheduler scheduler(pool, nullptr, 64, 8, 100);
  const StepCost cost(tiny(), 5e10);
  scheduler.add(sequence_of(5000, 5));
  EXPECT_EQ(tokens_of(scheduler.schedule(cost)), (Tokens{100}));  // alone, all of a step
  scheduler.add(sequence_of(6000, 5));
  EXPECT_EQ(tokens_of(scheduler.schedule(cost)), (Tokens{100}));  // a longer one waits its turn
  scheduler.add(sequence_of(30, 5));
  auto step = scheduler.schedule(cost);  // the oldest has half, then the shortest, then the rest
  EXPECT_EQ(tokens_of(step), (Tokens{50, 30, 20}));
  EXPECT_EQ(step[1].sequence->state->lengths.prompt, 30);
  advance(step);
  EXPECT_EQ(tokens_of(scheduler.schedule(cost)), (Tokens{1, 100}));  // nobody shorter is left
}

TEST(Scheduler, AdmitsInOrderOfArrivalAndOnlyWhatCanFinish) {
  BlockPool pool(10);  // 640 tokens
  Scheduler scheduler(pool, nullptr, 64, 8, 10000);
  const StepCost cost(tiny(), 5e10);
  scheduler.add(sequence_of(300, 20));  // 5 blocks
  scheduler.add(sequence_of(400, 20));  // 7 blocks: waits
  scheduler.add(sequence_of(10, 10));   // 1 block: waits behind it all the same
  EXPECT_EQ(tokens_of(scheduler.schedule(cost)), (Tokens{300}));
  EXPECT_EQ(scheduler.num_waiting(), 2);
  EXPECT_EQ(pool.num_available(), 5);
  scheduler.remove_if([](const Sequence& s) { return s.num_tokens() == 300; });
  EXPECT_EQ(tokens_of(scheduler.schedule(cost)), (Tokens{400, 10}));
  scheduler.remove_if([](const Sequence&) { return true; });
  EXPECT_TRUE(scheduler.empty());
  EXPECT_EQ(pool.num_available(), 10);
}

TEST(Scheduler, HoldsNoMoreThanABatch) {
  BlockPool pool(10);
  Scheduler scheduler(pool, nullptr, 64, 2, 100);
  const StepCost cost(tiny(), 5e10);
  for (int i = 0; i < 3; ++i) scheduler.add(sequence_of(5, 5));
  EXPECT_EQ(tokens_of(scheduler.schedule(cost)), (Tokens{5, 5}));
  EXPECT_EQ(scheduler.num_running(), 2);
  EXPECT_EQ(scheduler.num_waiting(), 1);
}

}  // namespace
}  // namespace longspan
