#include "engine/step_loop.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "backend/registry.h"
#include "engine/lengths.h"
#include "engine/load_ranks.h"
#include "engine/memory_plan.h"
#include "longspan/engine.h"
#include "longspan/error.h"
#include "model/architecture.h"
#include "support/small_engine.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

using test::prompt_of;

/// What an engine has for its thread, stepped turn by turn, with the CPU as a device that runs
/// behind: tokens of decodes are kept from the host until the next step has begun.
class StepLoopTest : public testing::Test {
 protected:
  StepLoopTest() {
    config_ = test::small_config();
    config_.device = "cpu";
    config_.enable_prefix_caching = true;
    engine_ = Engine::load(model_dir_.path(), config_);
    model_ = read_model_config(model_dir_.path(), "", 0.0, config_dialect);
    config_ = resolve_engine_config(config_, model_);
    std::vector<Rank> ranks = connect_ranks(make_backends("cpu", "float32", 2, 1));
    const Backend& backend = *ranks.front().backend;
    take_device_defaults(config_, model_, backend);
    const MemoryPlan plan = make_memory_plan(config_, model_, backend, bytes_per_rank(ranks));
    load_ranks(model_, config_, plan, *Checkpoint::open(model_dir_.path()), {}, ranks);
    ranks_ = std::make_unique<RankGroup>(std::move(ranks));
    rope_ = make_rope_method(model_.rope);
    cost_ = std::make_unique<StepCost>(model_, 1e9);
    pool_ = std::make_unique<BlockPool>(plan.num_blocks);
    prefixes_ = std::make_unique<PrefixCache>(*pool_, config_.cache_block_seq_len,
                                              [this](int32_t from, int32_t to, int64_t tokens) {
                                                ranks_->copy_kv_block(from, to, tokens);
                                              });
    scheduler_ = std::make_unique<Scheduler>(*pool_, prefixes_.get(), config_.cache_block_seq_len,
                                             config_.max_batch_size, 512);
    runner_ = std::make_unique<StepRunner>(model_, *ranks_, 8, true, [] { return false; });
    loop_ = std::make_unique<StepLoop>(*scheduler_, *cost_, *runner_, true, [] {});
  }

  std::shared_ptr<RequestState> state_of(const Request& request) const {
    const RequestLengths lengths =
        resolve_lengths(request, config_, 64, model_.vocab_size, 1 << 20);
    return std::make_shared<RequestState>(request, lengths, rope_->profile(lengths.rope_length), 7);
  }
  std::shared_ptr<RequestState> add(const Request& request) {
    auto state = state_of(request);
    scheduler_->add(std::make_unique<Sequence>(state));
    return state;
  }
  /// Turns until nothing is left; how many steps that took.
  int64_t run() {
    const int64_t before = loop_->counts().steps;
    while (!scheduler_->empty()) loop_->turn();
    EXPECT_EQ(pool_->num_available(), pool_->num_blocks());
    return loop_->counts().steps - before;
  }
  /// What an engine that waits for each token makes of the same request.
  RequestOutput expected(Request request) {
    request.generation.seed = 7;
    return engine_->run(std::move(request));
  }
  static void expect_same(RequestState& state, const RequestOutput& expected) {
    const RequestOutput& output = state.wait();
    EXPECT_EQ(output.token_ids, expected.token_ids);
    EXPECT_EQ(output.finish_reason, expected.finish_reason);
    EXPECT_EQ(output.stop_token_id, expected.stop_token_id);
  }

  const test::ModelDir model_dir_;
  EngineConfig config_;
  ModelConfig model_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<RankGroup> ranks_;
  std::unique_ptr<RopeMethod> rope_;
  std::unique_ptr<StepCost> cost_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<PrefixCache> prefixes_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<StepRunner> runner_;
  std::unique_ptr<StepLoop> loop_;
};

Request sampled(int64_t tokens, int64_t max_new_tokens, int32_t offset = 0) {
  Request request = prompt_of(tokens, max_new_tokens, offset);
  request.generation.do_sample = true;
  request.generation.top_k = 0;
  return request;
}

TEST_F(StepLoopTest, StartsADecodeBeforeTheTokensOfTheLastAreKnown) {
  const auto state = add(sampled(20, 6));
  loop_->turn();  // the prompt, whose token is waited for
  EXPECT_EQ(state->progress().generated, 1);
  for (int64_t known = 1; known < 5; ++known) {
    loop_->turn();
    EXPECT_EQ(state->progress().generated, known);
  }
  EXPECT_EQ(run(), 1);  // the sixth token has no step after it
  expect_same(*state, expected(sampled(20, 6)));
}

TEST_F(StepLoopTest, GeneratesWhatOneThatWaitsDoes) {
  Request edited = sampled(33, 9, 2);
  edited.generation.repetition_penalty = 1.5;
  const std::vector<Request> requests = {
      sampled(20, 30),   sampled(70, 3, 1),    edited,
      sampled(5, 12, 3), prompt_of(64, 20, 4), sampled(130, 1, 5)};
  std::vector<std::shared_ptr<RequestState>> states;
  for (const Request& request : requests) {  // one comes every second turn, more than fit at once
    states.push_back(add(request));
    loop_->turn();
    loop_->turn();
  }
  run();
  for (size_t i = 0; i < requests.size(); ++i) expect_same(*states[i], expected(requests[i]));
}

TEST_F(StepLoopTest, DropsWhatFollowsAStopToken) {
  Request request = sampled(50, 40);
  const std::vector<int32_t> free = expected(request).token_ids;
  request.generation.stop_token_ids = {free[20]};
  const RequestOutput stopped = expected(request);
  ASSERT_GE(stopped.token_ids.size(), 2U);
  const auto state = add(request);
  const auto other = add(sampled(30, 35, 9));
  run();
  expect_same(*state, stopped);
  expect_same(*other, expected(sampled(30, 35, 9)));

  // What is cached of it holds no more than its own tokens.
  Request next = request;
  next.generation.stop_token_ids.clear();
  next.input_ids.insert(next.input_ids.end(), stopped.token_ids.begin(), stopped.token_ids.end());
  next.input_ids.push_back((*stopped.stop_token_id + 1) % 97);
  next.input_ids.resize(next.input_ids.size() + 5, 3);
  const auto continued = add(next);
  run();
  EXPECT_GE(continued->wait().cached_tokens, 50);
  expect_same(*continued, expected(next));
}

TEST_F(StepLoopTest, SharesABlockWhenItsLastStepIsDone) {
  const auto state = add(sampled(60, 20));
  Request next = sampled(60, 1);
  const std::vector<int32_t> generated = expected(sampled(60, 20)).token_ids;
  next.input_ids.insert(next.input_ids.end(), generated.begin(), generated.begin() + 10);
  const Sequence sequence(state_of(next));
  for (int i = 0; i < 5; ++i) loop_->turn();  // the fifth starts the step of token 63
  EXPECT_EQ(state->progress().generated, 4);
  EXPECT_TRUE(prefixes_->match(sequence).empty());
  loop_->turn();
  EXPECT_EQ(prefixes_->match(sequence).size(), 1U);
  run();
}

TEST_F(StepLoopTest, EndsWhatIsCancelledWhileAStepIsUnderWay) {
  const auto state = add(sampled(20, 400));
  const auto other = add(sampled(25, 30, 1));
  for (int i = 0; i < 8; ++i) loop_->turn();
  state->cancel();
  loop_->turn();
  EXPECT_TRUE(state->ended());
  run();
  EXPECT_EQ(state->wait().finish_reason, FinishReason::kCancelled);
  const std::vector<int32_t> whole = expected(sampled(20, 20)).token_ids;
  const std::vector<int32_t>& got = state->wait().token_ids;
  ASSERT_LE(got.size(), whole.size());
  EXPECT_TRUE(std::equal(got.begin(), got.end(), whole.begin()));
  expect_same(*other, expected(sampled(25, 30, 1)));
}

TEST_F(StepLoopTest, FailsAllAmidAStep) {
  const auto state = add(sampled(20, 400));
  for (int i = 0; i < 4; ++i) loop_->turn();
  loop_->fail_all(std::make_exception_ptr(EngineClosed("closed")));
  EXPECT_THROW(state->wait(), EngineClosed);
  EXPECT_EQ(run(), 0);
}

}  // namespace
}  // namespace longspan
