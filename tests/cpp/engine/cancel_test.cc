#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <stdexcept>
#include <thread>

#include "longspan/engine.h"
#include "longspan/error.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

using std::chrono::milliseconds;

Request prompt_of(int64_t tokens, int64_t max_new_tokens) {
  Request request;
  request.input_ids.assign(static_cast<size_t>(tokens), 3);
  request.generation.max_new_tokens = max_new_tokens;
  return request;
}

std::unique_ptr<Engine> load(const test::ModelDir& model) {
  EngineConfig config;
  config.dtype = "float32";
  config.num_threads = 2;
  config.session_len = 20000;
  config.max_batch_size = 4;
  config.max_prefill_token_num = 256;
  return Engine::load(model.path(), config);
}

void expect_all_free(const Engine& engine) {
  const EngineMetrics metrics = engine.metrics();
  EXPECT_EQ(metrics.free_blocks, metrics.total_blocks);
  EXPECT_EQ(metrics.running, 0);
  EXPECT_EQ(metrics.waiting, 0);
}

TEST(Cancel, EndsAPrefillAndADecodeEarly) {
  const test::ModelDir model;
  const auto engine = load(model);
  const std::vector<int32_t> expected = engine->run(prompt_of(10, 5)).token_ids;
  const RequestHandle prefill = engine->submit(prompt_of(19000, 5));
  while (prefill.progress().prefill_done == 0) std::this_thread::sleep_for(milliseconds(1));
  prefill.cancel();
  EXPECT_EQ(prefill.wait().finish_reason, FinishReason::kCancelled);
  EXPECT_LT(prefill.progress().prefill_done, 19000);
  const RequestHandle decode = engine->submit(prompt_of(10, 19000));
  while (decode.tokens_from(0).size() < 3) std::this_thread::sleep_for(milliseconds(1));
  decode.cancel();
  EXPECT_EQ(decode.wait().finish_reason, FinishReason::kCancelled);
  expect_all_free(*engine);
  EXPECT_EQ(engine->run(prompt_of(10, 5)).token_ids, expected);
}

TEST(Cancel, AThrowingCallbackCancels) {
  const test::ModelDir model;
  const auto engine = load(model);
  EXPECT_THROW(engine->run(prompt_of(10, 19000),
                           [](const Progress&) { throw std::runtime_error("enough"); }),
               std::runtime_error);
  engine->run(prompt_of(10, 1));  // by whose end the other is gone
  expect_all_free(*engine);
}

TEST(Cancel, AThousandRandomCancellationsLeakNothing) {
  const test::ModelDir model;
  const auto engine = load(model);
  const std::vector<int32_t> expected = engine->run(prompt_of(40, 8)).token_ids;
  std::mt19937 random(3);
  std::vector<RequestHandle> handles;
  int cancelled = 0;
  for (int i = 0; i < 1000; ++i) {
    handles.push_back(engine->submit(prompt_of(1 + random() % 700, random() % 20)));
    if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 800));
    handles[random() % handles.size()].cancel();
    if (handles.size() > 12) {
      for (const RequestHandle& handle : handles) handle.cancel();
      for (const RequestHandle& handle : handles) {
        cancelled += handle.wait().finish_reason == FinishReason::kCancelled;
      }
      handles.clear();
    }
  }
  for (const RequestHandle& handle : handles) handle.wait();
  EXPECT_GT(cancelled, 100);
  expect_all_free(*engine);
  EXPECT_EQ(engine->run(prompt_of(40, 8)).token_ids, expected);
}

}  // namespace
}  // namespace longspan
