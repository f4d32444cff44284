#include "longspan/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <thread>

#include "longspan/error.h"
#include "support/small_engine.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

using test::prompt_of;
using test::small_config;

TEST(Engine, GeneratesTheSameAloneAndInCompany) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), small_config());
  std::vector<RequestOutput> alone;
  for (int i = 0; i < 6; ++i) alone.push_back(engine->run(prompt_of(5 + 60 * i, 12, i)));
  std::vector<RequestHandle> together;
  for (int i = 0; i < 6; ++i) together.push_back(engine->submit(prompt_of(5 + 60 * i, 12, i)));
  for (size_t i = 0; i < together.size(); ++i) {
    EXPECT_EQ(together[i].wait().token_ids, alone[i].token_ids) << i;
    EXPECT_EQ(together[i].wait().finish_reason, FinishReason::kLength);
    EXPECT_EQ(together[i].tokens_from(10).size(), 2U);
  }
}

TEST(Engine, RequestsSubmittedTogetherEnterTogether) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), small_config());
  std::vector<Request> requests;
  for (int i = 0; i < 4; ++i) requests.push_back(prompt_of(40 + 20 * i, 12, i));
  const auto signal = std::make_shared<Signal>();
  const std::vector<RequestHandle> handles = engine->submit_all(requests, signal);
  for (size_t i = 0; i < handles.size(); ++i) {
    EXPECT_EQ(handles[i].wait().input_token_len, 40 + 20 * static_cast<int64_t>(i));
  }
  EXPECT_TRUE(signal->wait_for(std::chrono::milliseconds(0)));
  requests.push_back(prompt_of(513, 1));
  EXPECT_THROW(engine->submit_all(requests), ContextTooLong);
  engine->close();
  EXPECT_EQ(engine->metrics().steps, 12);  // of all four, and none of the list that was refused
}

TEST(Engine, CountsARequestBeforeItsResultIsOut) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), small_config());
  for (int i = 1; i <= 200; ++i) {  // one step each: a thread that is late by a step shows
    const RequestHandle handle = engine->submit(prompt_of(5, 1, i));
    const EngineMetrics during = engine->metrics();
    EXPECT_TRUE(during.waiting + during.running == 1 || during.steps == i) << i;
    handle.wait();
    const EngineMetrics after = engine->metrics();
    EXPECT_EQ(after.steps, i);
    EXPECT_EQ(after.prefilled_tokens, 5 * i);
    EXPECT_EQ(after.waiting + after.running, 0) << i;
    EXPECT_EQ(after.free_blocks, after.total_blocks) << i;
  }
}

TEST(Engine, ChunkAndBlockAndThreadsChangeNothing) {
  const test::ModelDir model;
  const auto run = [&](int64_t chunk, int block, int threads) {
    EngineConfig config = small_config();
    config.max_prefill_token_num = chunk;
    config.cache_block_seq_len = block;
    config.num_threads = threads;
    Request request = prompt_of(300, 0);
    request.kind = RequestKind::kLogits;
    request.logit_positions = {0, 63, 64, 150, 299};
    const auto engine = Engine::load(model.path(), config);
    RequestOutput output = engine->run(request);
    request.kind = RequestKind::kScore;
    output.nll_sum = engine->run(request).nll_sum;
    return output;
  };
  const RequestOutput base = run(512, 64, 1);
  EXPECT_EQ(base.logits.size(), 5U * 97U);
  for (const auto& [chunk, block, threads] :
       {std::tuple{1, 64, 2}, {64, 64, 1}, {100, 128, 2}, {33, 256, 3}}) {
    const RequestOutput other = run(chunk, block, threads);
    EXPECT_EQ(other.logits, base.logits) << chunk << " " << block << " " << threads;
    EXPECT_EQ(other.nll_sum, base.nll_sum) << chunk << " " << block << " " << threads;
  }
}

TEST(Engine, ScoresAgreeWithLogits) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), small_config());
  Request request = prompt_of(150, 0);
  request.kind = RequestKind::kScore;
  const RequestOutput scored = engine->run(request);
  EXPECT_EQ(scored.nll_count, 149);
  request.kind = RequestKind::kLogits;
  request.logit_positions.resize(149);
  std::iota(request.logit_positions.begin(), request.logit_positions.end(), 0);
  const RequestOutput output = engine->run(request);
  double sum = 0.0;
  for (size_t i = 0; i < 149; ++i) {
    const float* row = output.logits.data() + i * 97;
    double total = 0.0;
    for (int v = 0; v < 97; ++v) total += std::exp(static_cast<double>(row[v]));
    sum += std::log(total) - row[request.input_ids[i + 1]];
  }
  EXPECT_NEAR(scored.nll_sum, sum, 1e-4 * sum);
}

TEST(Engine, ScalingLeavesShortRequestsBitIdentical) {
  const test::ModelDir model;
  EngineConfig scaled = small_config();
  scaled.rope_scaling_factor = 4.0;
  const auto plain_engine = Engine::load(model.path(), small_config());
  const auto scaled_engine = Engine::load(model.path(), scaled);
  Request request = prompt_of(60, 0);
  request.kind = RequestKind::kLogits;
  request.logit_positions = {59};
  const RequestOutput plain = plain_engine->run(request);
  EXPECT_EQ(scaled_engine->run(request).logits, plain.logits);
  Request far = prompt_of(300, 0);
  far.kind = RequestKind::kLogits;
  far.logit_positions = {299};
  const RequestOutput scaled_far = scaled_engine->run(far);
  EXPECT_NE(scaled_far.logits, plain_engine->run(far).logits);
  EXPECT_EQ(scaled_far.rope_profile.length, 300);
  EXPECT_EQ(scaled_engine->run(request).logits, plain.logits);  // nothing leaks between requests
}

TEST(Engine, SamplingRepeatsWithItsSeed) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), small_config());
  Request request = prompt_of(20, 30);
  request.generation.do_sample = true;
  request.generation.seed = 5;
  const RequestOutput first = engine->run(request);
  EXPECT_EQ(engine->run(request).token_ids, first.token_ids);
  request.generation.seed = 6;
  EXPECT_NE(engine->run(request).token_ids, first.token_ids);
  request.generation.seed.reset();
  const RequestOutput drawn = engine->run(request);
  request.generation.seed = drawn.seed;
  EXPECT_EQ(engine->run(request).token_ids, drawn.token_ids);
}

TEST(Engine, StopsAtStopTokensUnlessTold) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), small_config());
  const std::vector<int32_t> free = engine->run(prompt_of(20, 30)).token_ids;
  const int32_t stop = free[4];
  const auto first = std::find(free.begin(), free.end(), stop) - free.begin();
  Request request = prompt_of(20, 30);
  request.generation.stop_token_ids = {stop};
  const RequestOutput stopped = engine->run(request);
  EXPECT_EQ(stopped.finish_reason, FinishReason::kStop);
  EXPECT_EQ(stopped.stop_token_id, stop);
  EXPECT_EQ(std::ssize(stopped.token_ids), first);

  test::TinyLlama shape;
  shape.eos = stop;
  const test::ModelDir ending(shape);
  const auto other = Engine::load(ending.path(), small_config());
  EXPECT_EQ(other->model().eos_token_ids, std::vector<int32_t>{stop});
  EXPECT_EQ(std::ssize(other->run(prompt_of(20, 30)).token_ids), first);
  request = prompt_of(20, 30);
  request.generation.ignore_eos = true;
  EXPECT_EQ(other->run(request).token_ids, free);
}

TEST(Engine, ReportsAFullContext) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), small_config());
  const RequestOutput output = engine->run(prompt_of(500, 100));
  EXPECT_EQ(output.finish_reason, FinishReason::kContextFull);
  EXPECT_EQ(output.token_ids.size(), 12U);
  EXPECT_THROW(engine->submit(prompt_of(512, 1)), ContextTooLong);
  EXPECT_EQ(engine->run(prompt_of(10, 3)).token_ids.size(), 3U);
}

TEST(Engine, RefusesWhatCannotLoad) {
  test::TinyLlama shape;
  shape.poisoned = true;
  const test::ModelDir poisoned(shape);
  EXPECT_THROW(Engine::load(poisoned.path(), small_config()), CheckpointError);
  const test::ModelDir model;
  EngineConfig config = small_config();
  config.cache_max_entry_count = 2;  // 128 tokens for a session of 512
  EXPECT_THROW(Engine::load(model.path(), config), CapacityError);
  EXPECT_THROW(Engine::load(model.path() + "/nowhere", small_config()), CheckpointError);
  config = small_config();
  // Named before any field that only other families have.
  config.hf_overrides = R"({"architectures": ["FooForCausalLM"], "hidden_size": null})";
  EXPECT_THROW(Engine::load(model.path(), config), Unsupported);
  config.hf_overrides = R"({"vocab_size": 98})";
  EXPECT_THROW(Engine::load(model.path(), config), CheckpointError);
  config.hf_overrides = R"({"num_hidden_layers": 1})";  // leaves tensors unused
  EXPECT_THROW(Engine::load(model.path(), config), CheckpointError);
}

TEST(Engine, LoadReportsProgressAndStopsWhenTheCallbackThrows) {
  const test::ModelDir model;
  int64_t last = 0;
  int64_t total = 0;
  Engine::load(model.path(), small_config(), [&](int64_t done, int64_t all) {
    EXPECT_GT(done, last);
    last = done;
    total = all;
  });
  EXPECT_GT(total, 0);
  EXPECT_EQ(last, total);
  EXPECT_THROW(Engine::load(model.path(), small_config(),
                            [](int64_t, int64_t) { throw std::runtime_error("stop"); }),
               std::runtime_error);
}

TEST(Engine, CloseEndsEverythingAndIsIdempotent) {
  const test::ModelDir model;
  EngineConfig config = small_config();
  config.session_len = 100000;
  const auto engine = Engine::load(model.path(), config);
  const RequestHandle handle = engine->submit(prompt_of(90000, 10));
  std::thread other([&] { engine->close(); });
  engine->close();
  other.join();
  EXPECT_THROW(handle.wait(), EngineClosed);
  EXPECT_THROW(engine->submit(prompt_of(3, 3)), EngineClosed);
  EXPECT_EQ(engine->model().vocab_size, 97);
}

}  // namespace
}  // namespace longspan
