#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "longspan/engine.h"
#include "support/small_engine.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

constexpr int64_t kNative = 64;  // of the tiny model; scaling sets in beyond it

#if defined(__SANITIZE_THREAD__)
constexpr int kRequests = 20;  // each takes twenty times as long
#else
constexpr int kRequests = 400;
#endif

EngineConfig config_of(int block_len, bool caching) {
  EngineConfig config = test::small_config();
  config.max_prefill_token_num = 150;
  config.cache_block_seq_len = block_len;
  config.enable_prefix_caching = caching;
  return config;
}

std::vector<int32_t> tokens_of(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(random() % 97));
  return tokens;
}

Request generation_of(std::vector<int32_t> tokens, int64_t max_new_tokens) {
  Request request;
  request.input_ids = std::move(tokens);
  request.generation.max_new_tokens = max_new_tokens;
  return request;
}

Request logits_of(std::vector<int32_t> tokens, std::vector<int64_t> positions) {
  Request request;
  request.kind = RequestKind::kLogits;
  request.input_ids = std::move(tokens);
  request.logit_positions = std::move(positions);
  return request;
}

/// Random requests that begin alike: prefixes of four texts, most of them followed by something
/// else, of any kind.
Request random_request(std::mt19937& random, int64_t longest) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const int64_t kind = below(8);
  std::vector<int32_t> tokens = tokens_of(longest - 40, static_cast<uint32_t>(below(4)));
  tokens.resize(static_cast<size_t>(2 + below(std::ssize(tokens) - 2)));
  if (below(4) > 0) {
    for (const int32_t token : tokens_of(1 + below(20), random())) tokens.push_back(token);
  }
  const int64_t count = std::ssize(tokens);
  Request request = generation_of(std::move(tokens), below(20));
  if (kind == 0) {
    request.kind = RequestKind::kScore;
  } else if (kind == 1) {
    request = logits_of(std::move(request.input_ids), {below(count)});
  } else if (kind == 2) {
    request.generation.do_sample = true;
    request.generation.seed = random();
  } else if (kind == 3) {
    request.token_nll = true;
  } else if (kind == 4) {
    request.generation.repetition_penalty = 1.5;
    request.generation.logprobs = 2;
  }
  return request;
}

void expect_same(const RequestOutput& got, const RequestOutput& expected) {
  EXPECT_EQ(got.token_ids, expected.token_ids);
  EXPECT_EQ(got.finish_reason, expected.finish_reason);
  EXPECT_EQ(got.nll_sum, expected.nll_sum);
  EXPECT_EQ(got.nll_count, expected.nll_count);
  EXPECT_EQ(got.token_nll, expected.token_nll);
  EXPECT_EQ(got.logits, expected.logits);
  EXPECT_EQ(expected.cached_tokens, 0);
}

/// Short and long requests with shared prefixes, several at once, some cancelled, in a pool of
/// num_blocks: each one that ends equals, bit for bit, the same request alone in an engine without
/// a prefix cache.
void compare_with_cold_runs(EngineConfig config, int64_t num_blocks, int count, uint32_t seed) {
  const test::ModelDir model;
  config.cache_max_entry_count = static_cast<double>(num_blocks);
  const auto warm = Engine::load(model.path(), config);
  config.enable_prefix_caching = false;
  const auto cold = Engine::load(model.path(), config);
  std::mt19937 random(seed);
  struct Submitted {
    Request request;
    RequestHandle handle;
  };
  std::vector<Submitted> submitted;
  int64_t compared = 0;
  int64_t reused = 0;
  const auto settle = [&] {
    for (const auto& [request, handle] : submitted) {
      const RequestOutput& got = handle.wait();
      EXPECT_LT(got.cached_tokens, got.input_token_len);
      reused += got.cached_tokens;
      if (got.finish_reason == FinishReason::kCancelled) continue;
      expect_same(got, cold->run(request));
      ++compared;
    }
    submitted.clear();
  };
  for (int i = 0; i < count && !testing::Test::HasFailure(); ++i) {
    Request request = random_request(random, config.session_len);
    RequestHandle handle = warm->submit(request);
    submitted.push_back({std::move(request), std::move(handle)});
    if (random() % 10 == 0) submitted[random() % submitted.size()].handle.cancel();
    if (random() % 8 == 0) settle();
  }
  settle();
  const EngineMetrics metrics = warm->metrics();
  EXPECT_EQ(metrics.prefix_hit_tokens, reused);
  EXPECT_GT(reused, 20 * count);  // else nothing was tested
  EXPECT_GT(metrics.prefix_miss_tokens, 0);
  EXPECT_GT(metrics.prefix_evictions, count / 8);
  EXPECT_GT(metrics.cached_blocks, 0);
  EXPECT_GT(compared, count * 3 / 4);
  EXPECT_EQ(cold->metrics().prefix_miss_tokens, 0);
  EXPECT_EQ(cold->metrics().cached_blocks, 0);
}

TEST(PrefixSharing, EqualsColdRunsInBlocksOf64) {
  compare_with_cold_runs(config_of(64, true), 20, kRequests, 1);
}
TEST(PrefixSharing, EqualsColdRunsInBlocksOf128) {
  compare_with_cold_runs(config_of(128, true), 9, kRequests, 2);
}
TEST(PrefixSharing, EqualsColdRunsInBlocksOf256) {
  compare_with_cold_runs(config_of(256, true), 5, kRequests, 3);
}
TEST(PrefixSharing, EqualsColdRunsInAPoolOfOneSession) {
  compare_with_cold_runs(config_of(64, true), 8, kRequests, 4);
}
TEST(PrefixSharing, EqualsColdRunsInBfloat16) {
  EngineConfig config = config_of(64, true);
  config.dtype = "bfloat16";
  compare_with_cold_runs(config, 20, kRequests, 5);
}
TEST(PrefixSharing, EqualsColdRunsUnderMixedProfiles) {
  EngineConfig config = config_of(64, true);
  config.rope_scaling_factor = 4.0;  // dynamic NTK: nearly every length has a profile of its own
  config.rope_length.policy = RopeLengthPolicy::kBucket;
  compare_with_cold_runs(config, 20, kRequests, 6);
}

TEST(PrefixSharing, RequestsShareWhenTheirProfilesHaveTheSameValues) {
  const test::ModelDir model;
  const std::vector<int32_t> tokens = tokens_of(100, 1);
  const auto second_of = [&](RopeLength rope_length, int64_t first_new, int64_t second_new) {
    EngineConfig config = config_of(64, true);
    config.rope_scaling_factor = 4.0;
    config.rope_length = rope_length;
    const auto engine = Engine::load(model.path(), config);
    engine->run(generation_of(tokens, first_new));
    const RequestOutput second = engine->run(generation_of(tokens, second_new));
    config.enable_prefix_caching = false;
    const auto cold = Engine::load(model.path(), config);
    expect_same(second, cold->run(generation_of(tokens, second_new)));
    return second.cached_tokens;
  };
  EXPECT_EQ(second_of({RopeLengthPolicy::kRequest}, 5, 5), 99);
  EXPECT_EQ(second_of({RopeLengthPolicy::kRequest}, 5, 6), 0);  // dynamic NTK of another length
  EXPECT_EQ(second_of({RopeLengthPolicy::kPrompt}, 5, 6), 99);
  EXPECT_EQ(second_of({RopeLengthPolicy::kSession}, 5, 6), 99);
  EXPECT_EQ(second_of({RopeLengthPolicy::kBucket}, 5, 6), 99);
  EXPECT_EQ(second_of({RopeLengthPolicy::kBucket}, 5, 28), 99);  // both up to 128
  EXPECT_EQ(second_of({RopeLengthPolicy::kFixed, 200}, 5, 6), 99);
}

TEST(PrefixSharing, WithinTheTrainedLengthEveryLengthShares) {
  const test::ModelDir model;
  EngineConfig config = config_of(64, true);
  config.rope_scaling_factor = 4.0;
  const auto engine = Engine::load(model.path(), config);
  const std::vector<int32_t> tokens = tokens_of(kNative - 10, 1);
  engine->run(generation_of(tokens, 3));
  EXPECT_EQ(engine->run(generation_of(tokens, 9)).cached_tokens, kNative - 11);
}

TEST(PrefixSharing, ScoresAndLogitsUnderThePrefixCache) {
  const test::ModelDir model;
  const auto warm = Engine::load(model.path(), config_of(64, true));
  const auto cold = Engine::load(model.path(), config_of(64, false));
  const std::vector<int32_t> tokens = tokens_of(400, 9);
  Request score;
  score.kind = RequestKind::kScore;
  score.input_ids = tokens;
  expect_same(warm->run(score), cold->run(score));
  const RequestOutput again = warm->run(score);
  expect_same(again, cold->run(score));
  EXPECT_EQ(again.cached_tokens, 0);
  const Request last = logits_of(tokens, {399});
  const RequestOutput last_row = warm->run(last);
  EXPECT_EQ(last_row.cached_tokens, 399);  // what the scores left
  expect_same(last_row, cold->run(last));
  const Request middle = logits_of(tokens, {100, 399});
  const RequestOutput rows = warm->run(middle);
  EXPECT_EQ(rows.cached_tokens, 100);
  expect_same(rows, cold->run(middle));
}

TEST(PrefixSharing, ProgressCountsWhatWasCachedButItsRateDoesNot) {
  const test::ModelDir model;
  const auto engine = Engine::load(model.path(), config_of(64, true));
  const std::vector<int32_t> tokens = tokens_of(400, 9);
  engine->run(generation_of(tokens, 1));
  const RequestHandle handle = engine->submit(generation_of(tokens, 1));
  const RequestOutput& output = handle.wait();
  const Progress progress = handle.progress();
  EXPECT_EQ(output.cached_tokens, 399);
  EXPECT_EQ(progress.prefill_done, 400);
  EXPECT_NEAR(progress.tokens_per_s * output.prefill_s, 1.0, 1e-6);
  // The last row's linears and its 400 keys, counted by hand from the tiny model's shape.
  const ModelInfo& m = engine->model();
  const auto table = static_cast<double>(m.vocab_size * m.hidden_size);
  const auto norms = static_cast<double>((2 * m.num_layers + 1) * m.hidden_size);
  const double weights = static_cast<double>(m.num_parameters) - table - norms;
  const auto pairs = static_cast<double>(m.num_layers * m.num_heads * m.head_dim * 400);
  const double flops = progress.flops_per_s * output.prefill_s;
  EXPECT_NEAR(flops / (2 * weights + 4 * pairs), 1.0, 0.01);
}

}  // namespace
}  // namespace longspan
