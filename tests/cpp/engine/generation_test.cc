#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>

#include "longspan/engine.h"
#include "longspan/error.h"
#include "support/small_engine.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

using test::prompt_of;

using std::chrono::milliseconds;

std::unique_ptr<Engine> load(const test::ModelDir& model) {
  return Engine::load(model.path(), test::small_config());
}

/// The model's logits after `ids`, float64.
std::vector<double> logits_after(Engine& engine, const std::vector<int32_t>& ids) {
  Request request;
  request.kind = RequestKind::kLogits;
  request.input_ids = ids;
  request.logit_positions = {std::ssize(ids) - 1};
  const RequestOutput output = engine.run(request);
  return {output.logits.begin(), output.logits.end()};
}

/// Greedy generation written down in double precision, with every edit as its definition says.
std::vector<int32_t> expected_greedy(Engine& engine, const Request& request) {
  const GenerationConfig& g = request.generation;
  std::vector<int32_t> ids = request.input_ids;
  std::map<int32_t, int> counts;
  for (int64_t step = 0; step < *g.max_new_tokens; ++step) {
    std::vector<double> x = logits_after(engine, ids);
    for (const int32_t token : std::set<int32_t>(ids.begin(), ids.end())) {
      double& logit = x[static_cast<size_t>(token)];
      logit = logit > 0 ? logit / g.repetition_penalty : logit * g.repetition_penalty;
    }
    for (const auto& [token, count] : counts) {
      x[static_cast<size_t>(token)] -= count * g.frequency_penalty + g.presence_penalty;
    }
    for (const std::vector<int32_t>& bad : g.bad_sequences) {
      std::vector<int32_t> after = ids;
      after.push_back(bad.back());
      if (after.size() >= bad.size() && std::equal(bad.rbegin(), bad.rend(), after.rbegin())) {
        x[static_cast<size_t>(bad.back())] = -INFINITY;
      }
    }
    if (step < g.min_new_tokens) {
      for (const int32_t token : g.stop_token_ids) x[static_cast<size_t>(token)] = -INFINITY;
    }
    const auto token = static_cast<int32_t>(std::max_element(x.begin(), x.end()) - x.begin());
    if (std::count(g.stop_token_ids.begin(), g.stop_token_ids.end(), token) > 0) break;
    ids.push_back(token);
    ++counts[token];
  }
  return {ids.begin() + std::ssize(request.input_ids), ids.end()};
}

TEST(Generation, PenaltiesAndBansAreTheirDefinitions) {
  const test::ModelDir model;
  const auto engine = load(model);
  const std::vector<int32_t> plain = engine->run(prompt_of(30, 24)).token_ids;
  const auto expect_as_defined = [&](const char* what, const auto& configure) {
    Request request = prompt_of(30, 24);
    configure(request.generation);
    const std::vector<int32_t> got = engine->run(request).token_ids;
    EXPECT_EQ(got, expected_greedy(*engine, request)) << what;
    EXPECT_NE(got, plain) << what << " changes nothing";
  };
  expect_as_defined("repetition", [](GenerationConfig& g) { g.repetition_penalty = 1.3; });
  expect_as_defined("rewarded repetition", [](GenerationConfig& g) { g.repetition_penalty = 0.4; });
  expect_as_defined("frequency", [](GenerationConfig& g) { g.frequency_penalty = 0.3; });
  expect_as_defined("presence", [](GenerationConfig& g) { g.presence_penalty = 1.7; });
  expect_as_defined("all three", [](GenerationConfig& g) {
    g.repetition_penalty = 1.1;
    g.frequency_penalty = 0.2;
    g.presence_penalty = -0.3;
  });
  expect_as_defined("bad tokens",
                    [&](GenerationConfig& g) { g.bad_sequences = {{plain[0]}, {plain[3]}}; });
  expect_as_defined("bad sequences", [&](GenerationConfig& g) {
    g.bad_sequences = {{plain[1], plain[2]}, {plain[3], plain[4], plain[5]}};
  });
  expect_as_defined("begins in the prompt",
                    [&](GenerationConfig& g) {  // its beginning is in the prompt
                      g.bad_sequences = {{prompt_of(30, 0).input_ids.back(), plain[0]}};
                    });
  expect_as_defined("least length", [&](GenerationConfig& g) {
    g.stop_token_ids = {plain[0], plain[1], plain[2]};
    g.min_new_tokens = 6;
  });
}

TEST(Generation, EditsAreASequencesOwn) {
  const test::ModelDir model;
  const auto engine = load(model);
  Request edited = prompt_of(30, 16);
  edited.generation.repetition_penalty = 1.5;
  edited.generation.logprobs = 3;
  const RequestOutput alone = engine->run(edited);
  const std::vector<int32_t> plain = engine->run(prompt_of(30, 16)).token_ids;
  const RequestHandle a = engine->submit(prompt_of(30, 16));
  const RequestHandle b = engine->submit(edited);
  const RequestHandle c = engine->submit(prompt_of(30, 16));
  EXPECT_EQ(a.wait().token_ids, plain);
  EXPECT_EQ(b.wait().token_ids, alone.token_ids);
  EXPECT_EQ(c.wait().token_ids, plain);
  ASSERT_EQ(b.wait().logprobs.size(), alone.logprobs.size());
  for (size_t i = 0; i < alone.logprobs.size(); ++i) {
    EXPECT_EQ(b.wait().logprobs[i].token, alone.logprobs[i].token);
    EXPECT_EQ(b.wait().logprobs[i].logprob, alone.logprobs[i].logprob);
  }
  EXPECT_TRUE(a.wait().logprobs.empty());
}

TEST(Generation, LogprobsAreTheModelsOwn) {
  const test::ModelDir model;
  const auto engine = load(model);
  Request request = prompt_of(30, 8);
  request.generation.do_sample = true;
  request.generation.temperature = 2.0;
  request.generation.seed = 4;
  request.generation.repetition_penalty = 1.4;
  request.generation.logprobs = 5;
  request.token_nll = true;
  const RequestHandle handle = engine->submit(request);
  const RequestOutput& output = handle.wait();
  ASSERT_EQ(output.logprobs.size(), 8U * 6U);
  EXPECT_EQ(handle.logprobs_from(5).size(), 3U * 6U);
  std::vector<int32_t> ids = request.input_ids;
  for (size_t i = 0; i < 8; ++i) {
    const std::vector<double> x = logits_after(*engine, ids);
    double total = 0.0;
    for (const double logit : x) total += std::exp(logit);
    std::vector<int32_t> order(x.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
    });
    order.insert(order.begin(), output.token_ids[i]);
    for (size_t j = 0; j < 6; ++j) {
      const TokenLogprob& got = output.logprobs[i * 6 + j];
      EXPECT_EQ(got.token, order[j]);
      EXPECT_NEAR(got.logprob, x[static_cast<size_t>(order[j])] - std::log(total), 1e-5);
    }
    ids.push_back(output.token_ids[i]);
  }
  Request score = prompt_of(30, 0);
  score.kind = RequestKind::kScore;
  score.token_nll = true;
  const RequestOutput scored = engine->run(score);
  EXPECT_EQ(output.token_nll, scored.token_nll);
  EXPECT_EQ(output.nll_count, 29);
}

TEST(Generation, BadOptionsAreRefusedByName) {
  const test::ModelDir model;
  const auto engine = load(model);
  const auto refused = [&](const char* name, const auto& configure) {
    Request request = prompt_of(5, 5);
    configure(request.generation);
    for (const bool submit : {false, true}) {
      try {
        submit ? static_cast<void>(engine->submit(request)) : engine->check(request);
        ADD_FAILURE() << name;
      } catch (const InvalidArgument& error) {
        EXPECT_EQ(std::string(error.what()).find(name), 0U) << error.what();
      }
    }
  };
  refused("min_p: expected", [](GenerationConfig& g) { g.min_p = 1.1; });
  refused("min_p: expected", [](GenerationConfig& g) { g.min_p = NAN; });
  refused("repetition_penalty: expected", [](GenerationConfig& g) { g.repetition_penalty = 0; });
  refused("frequency_penalty: expected", [](GenerationConfig& g) { g.frequency_penalty = NAN; });
  refused("presence_penalty: expected", [](GenerationConfig& g) { g.presence_penalty = INFINITY; });
  refused("min_new_tokens: expected", [](GenerationConfig& g) { g.min_new_tokens = -1; });
  refused("min_new_tokens: expected", [](GenerationConfig& g) { g.min_new_tokens = 6; });
  refused("logprobs: expected", [](GenerationConfig& g) { g.logprobs = 98; });
  refused("logprobs: expected", [](GenerationConfig& g) { g.logprobs = -1; });
  refused("bad_sequences: expected", [](GenerationConfig& g) { g.bad_sequences = {{}}; });
  refused("bad_sequences: expected", [](GenerationConfig& g) { g.bad_sequences = {{3, 97}}; });
  refused("bad_sequences: expected", [](GenerationConfig& g) {
    for (int32_t i = 0; i < 97; ++i) g.bad_sequences.push_back({i});
  });
  EXPECT_EQ(engine->metrics().steps, 0);
}

TEST(Generation, ARequestMayHaveItsOwnRopeLength) {
  test::TinyLlama shape;
  const test::ModelDir model(shape);  // trained to 64 tokens
  EngineConfig config;
  config.dtype = "float32";
  config.num_threads = 1;
  config.session_len = 512;
  config.rope_scaling_factor = 2.0;
  const auto engine = Engine::load(model.path(), config);
  Request request = prompt_of(60, 10);
  EXPECT_EQ(engine->run(request).rope_profile.length, 70);
  request.rope_length = RopeLength{RopeLengthPolicy::kBucket, 0};
  EXPECT_EQ(engine->run(request).rope_profile.length, 128);
  request.rope_length = RopeLength{RopeLengthPolicy::kFixed, 65};
  const RequestOutput bounded = engine->run(request);
  EXPECT_EQ(bounded.token_ids.size(), 5U);
  EXPECT_EQ(bounded.finish_reason, FinishReason::kContextFull);
  request.rope_length = RopeLength{RopeLengthPolicy::kFixed, 0};
  EXPECT_THROW(engine->submit(request), InvalidArgument);
}

TEST(Generation, WaitingForTokensDoesNotMissOne) {
  const test::ModelDir model;
  const auto engine = load(model);
  const RequestHandle handle = engine->submit(prompt_of(20, 400));
  int64_t count = 0;
  while (!handle.wait_for(milliseconds(0))) {
    ASSERT_TRUE(handle.wait_for_tokens(count, milliseconds(20000)));
    count += std::ssize(handle.tokens_from(count));
  }
  count += std::ssize(handle.tokens_from(count));
  EXPECT_EQ(count, 400);
  EXPECT_TRUE(handle.wait_for_tokens(1000, milliseconds(0)));  // it has ended
  const RequestHandle other = engine->submit(prompt_of(20, 400));
  EXPECT_FALSE(other.wait_for_tokens(399, milliseconds(1)));
  other.cancel();
}

TEST(Generation, ASignalTellsOfAllItsRequests) {
  const test::ModelDir model;
  const auto engine = load(model);
  const auto signal = std::make_shared<Signal>();
  EXPECT_FALSE(signal->wait_for(milliseconds(1)));
  std::vector<RequestHandle> handles;
  for (int i = 0; i < 6; ++i) handles.push_back(engine->submit(prompt_of(9, 20 + i), signal));
  const auto all_done = [&] {
    return std::all_of(handles.begin(), handles.end(),
                       [](const RequestHandle& h) { return h.wait_for(milliseconds(0)); });
  };
  while (!all_done()) ASSERT_TRUE(signal->wait_for(milliseconds(20000)));
  signal->wait_for(milliseconds(0));
  std::thread other([&] { signal->notify(); });
  EXPECT_TRUE(signal->wait_for(milliseconds(20000)));
  other.join();
}

}  // namespace
}  // namespace longspan
