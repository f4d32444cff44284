#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <random>
#include <stdexcept>
#include <thread>

#include "backend/registry.h"
#include "engine/load_ranks.h"
#include "engine/memory_plan.h"
#include "longspan/engine.h"
#include "longspan/error.h"
#include "support/expect_throw.h"
#include "support/small_engine.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

using test::prompt_of;

using test::expect_throw;

// Ranks add float32 sums of at most 96 products in another order than one rank does; the logits of
// these models are of the order of 1.
constexpr double kTolerance = 2e-5;

struct Ranks {
  int tp = 1;
  int cp = 1;
};

/// Shapes that tp sizes split in different ways: KV heads shared out, one to a rank, and one to
/// several ranks; vocabularies that no size divides. Ranks that share the context or do not.
struct Case {
  test::TinyLlama shape;
  std::vector<Ranks> sizes;
};

std::vector<Case> cases() {
  return {{{.vocab_size = 97, .intermediate_size = 96, .num_heads = 8, .num_kv_heads = 4},
           {{2}, {4}, {8}, {2, 2}, {4, 2}, {4, 4}}},
          {{.vocab_size = 101,
            .intermediate_size = 96,
            .num_heads = 8,
            .num_kv_heads = 2,
            .tied = false},
           {{2}, {4}, {8, 2}}},
          {{.vocab_size = 103, .intermediate_size = 96, .num_heads = 9, .num_kv_heads = 3},
           {{3}, {2, 2}, {3, 3}}}};
}

EngineConfig config_of(int tp, int cp = 1) {
  EngineConfig config = test::small_config();
  config.device = "cpu";
  config.max_prefill_token_num = 270;  // enough for steps whose rows are split
  config.tp = tp;
  config.cp = cp;
  return config;
}

void expect_near(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], kTolerance) << i;
}

/// Everything that a request can ask for, of one engine.
struct Results {
  std::vector<float> logits;
  std::vector<double> token_nll;
  std::vector<RequestOutput> outputs;
};

Results results_of(Engine& engine) {
  Results results;
  Request logits = prompt_of(130, 0);
  logits.kind = RequestKind::kLogits;
  logits.logit_positions = {0, 63, 64, 129};
  results.logits = engine.run(logits).logits;
  Request score = prompt_of(290, 0);  // a block for each of four ranks that share a context
  score.kind = RequestKind::kScore;
  score.token_nll = true;
  results.token_nll = engine.run(score).token_nll;
  std::vector<RequestHandle> handles;
  constexpr int64_t kTokens[] = {40, 245, 70, 90, 30, 55};
  for (int i = 0; i < 6; ++i) {
    Request request = prompt_of(kTokens[i], 12, i / 2);  // two of them begin alike
    GenerationConfig& g = request.generation;
    if (i % 2 == 1) g.repetition_penalty = 1.3;
    if (i == 2) g.logprobs = 5;
    if (i == 3) g.bad_sequences = {{5}, {7, 8}};
    if (i >= 4) {
      g.do_sample = true;
      g.seed = 17;
      g.top_p = 0.9;
    }
    handles.push_back(engine.submit(request));
  }
  for (const RequestHandle& handle : handles) results.outputs.push_back(handle.wait());
  return results;
}

// Others look without a prefix cache (ResultsDependOnTheSizeAlone, tests/python): here it is on,
// cold for the first prompt of each beginning, warm for the next.
TEST(TensorParallel, EverySizeGivesWhatOneRankGives) {
  for (const Case& c : cases()) {
    const test::ModelDir model(c.shape);
    const Results one = results_of(*Engine::load(model.path(), config_of(1)));
    for (const auto& [tp, cp] : c.sizes) {
      SCOPED_TRACE(testing::Message() << "tp " << tp << " cp " << cp);
      EngineConfig config = config_of(tp, cp);
      config.enable_prefix_caching = true;
      const auto engine = Engine::load(model.path(), config);
      const Results many = results_of(*engine);
      expect_near(many.logits, one.logits);
      ASSERT_EQ(many.token_nll.size(), one.token_nll.size());
      for (size_t i = 0; i < one.token_nll.size(); ++i) {
        ASSERT_NEAR(many.token_nll[i], one.token_nll[i], kTolerance) << i;
      }
      for (size_t i = 0; i < one.outputs.size(); ++i) {
        EXPECT_EQ(many.outputs[i].token_ids, one.outputs[i].token_ids) << i;
        ASSERT_EQ(many.outputs[i].logprobs.size(), one.outputs[i].logprobs.size());
        for (size_t j = 0; j < one.outputs[i].logprobs.size(); ++j) {
          EXPECT_EQ(many.outputs[i].logprobs[j].token, one.outputs[i].logprobs[j].token);
          EXPECT_NEAR(many.outputs[i].logprobs[j].logprob, one.outputs[i].logprobs[j].logprob,
                      kTolerance);
        }
      }
      EXPECT_GT(engine->metrics().prefix_hit_tokens, 0);
    }
  }
}

TEST(TensorParallel, ResultsDependOnTheSizeAlone) {
  const test::ModelDir model(cases().front().shape);
  int cp = 1;
  const auto run = [&](int64_t chunk, int threads) {
    EngineConfig config = config_of(4, cp);
    config.max_prefill_token_num = chunk;
    config.num_threads = threads;
    Request request = prompt_of(300, 0);
    request.kind = RequestKind::kLogits;
    request.logit_positions = {0, 99, 299};
    return Engine::load(model.path(), config)->run(request).logits;
  };
  for (cp = 1; cp <= 4; cp *= 2) {
    const std::vector<float> base = run(512, 1);  // rows are split, of smaller chunks not
    EXPECT_EQ(run(33, 5), base);
    EXPECT_EQ(run(100, 2), base);
  }
}

TEST(TensorParallel, RefusesWhatDoesNotDivideTheModel) {
  const test::ModelDir model({.intermediate_size = 96, .num_heads = 9, .num_kv_heads = 3});
  for (const int tp : {0, -1, 2, 4, 6, 1000}) {
    expect_throw<InvalidArgument>([&] { Engine::load(model.path(), config_of(tp)); },
                                  "tp: expected one of 1, 3 for a model of 9 query and 3 KV heads "
                                  "and intermediate_size 96, got " +
                                      std::to_string(tp));
  }
  const auto expect_refused = [&](int tp, int cp, const std::string& why) {
    expect_throw<InvalidArgument>([&] { Engine::load(model.path(), config_of(tp, cp)); }, why);
  };
  expect_refused(6, 4, "cp: expected one of 2, 6 with tp=6 for a model of 9 query and 3 KV heads");
  expect_refused(3, 0, "cp: expected one of 1, 3 with tp=3 for a model of 9 query and 3 KV heads");
  expect_refused(5, 2, "tp: expected one of 2, 6 with cp=2 for a model of 9 query and 3 KV heads");
  expect_refused(5, 5, "tp: expected one of 1, 3 for a model of 9 query and 3 KV heads");
  EngineConfig config = config_of(2, 2);
  config.prefill_attention = "int8";
  expect_throw<Unsupported>([&] { Engine::load(model.path(), config); },
                            "prefill_attention: expected \"auto\" with cp=2, got \"int8\"");
  config = config_of(3);
  config.device = "cuda:1";
  expect_throw<InvalidArgument>([&] { Engine::load(model.path(), config); }, "device: expected");
}

TEST(TensorParallel, PlansTheBytesOfARank) {
  const test::ModelDir model({.vocab_size = 96,
                              .intermediate_size = 96,
                              .num_heads = 8,
                              .num_kv_heads = 4,
                              .head_dim = 64});
  const MemoryPlan one = plan_memory(model.path(), config_of(1), int64_t{1} << 30);
  const MemoryPlan four = plan_memory(model.path(), config_of(4), int64_t{1} << 30);
  EXPECT_LT(four.block_bytes, one.block_bytes / 2);
  EXPECT_LT(four.weight_bytes, one.weight_bytes / 2);
  EXPECT_LT(four.activation_bytes, one.activation_bytes);
}

TEST(ContextParallel, EveryRankHoldsItsShareOfASession) {
  const test::ModelDir model(cases().front().shape);
  EngineConfig config = config_of(4, 4);
  config.cache_max_entry_count = 2;  // blocks of a rank: 512 tokens on four
  const MemoryPlan plan = plan_memory(model.path(), config, int64_t{1} << 30);
  EXPECT_TRUE(plan.fits);
  EXPECT_EQ(plan.kv_capacity, 512);
  EXPECT_EQ(plan.max_session_len, 512);
  EXPECT_EQ(plan.session_kv_bytes, 2 * plan.block_bytes);
  config.session_len = 513;
  EXPECT_EQ(plan_memory(model.path(), config, int64_t{1} << 30).session_kv_bytes,
            3 * plan.block_bytes);
  config.session_len = 512;
  Request request = prompt_of(500, 12);
  const auto engine = Engine::load(model.path(), config);
  const std::vector<int32_t> tokens = engine->run(request).token_ids;
  EXPECT_EQ(engine->metrics().total_blocks, 2);
  EXPECT_EQ(tokens, Engine::load(model.path(), config_of(1))->run(request).token_ids);
  config.tp = config.cp = 1;
  expect_throw<CapacityError>([&] { Engine::load(model.path(), config); },
                              "session_len: expected at most 128 tokens");
}

// A key may fall to the other side of a half of its code: a few elements of 1 / 127 or, in int4,
// 1 / 15 of the largest, whose weight in a prediction is that of one among 200 tokens.
TEST(TensorParallel, EveryCacheFormatScoresAsOnOneRank) {
  const test::ModelDir model(cases().front().shape);
  for (const std::string_view format : kKvFormatNames) {
    SCOPED_TRACE(format);
    const auto score = [&](int tp, int cp) {
      EngineConfig config = config_of(tp, cp);
      config.kv_cache_dtype = format;
      Request request = prompt_of(200, 0);
      request.kind = RequestKind::kScore;
      const RequestOutput out = Engine::load(model.path(), config)->run(request);
      return out.nll_sum / static_cast<double>(out.nll_count);
    };
    const double one = score(1, 1);
    for (const auto& [tp, cp] : {Ranks{4, 1}, Ranks{2, 2}, Ranks{4, 2}}) {
      EXPECT_NEAR(score(tp, cp), one, 1e-4) << "tp " << tp << " cp " << cp;
    }
  }
}

TEST(TensorParallel, CancelsBetweenLayersAtAnyMoment) {
  const test::ModelDir model(cases().front().shape);
  EngineConfig config = config_of(4);
  config.session_len = 6000;
  const auto engine = Engine::load(model.path(), config);
  const std::vector<int32_t> expected = engine->run(prompt_of(10, 5)).token_ids;
  std::mt19937 random(3);
  for (int i = 0; i < 12; ++i) {
    const RequestHandle handle = engine->submit(prompt_of(5000, 900));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 30000));
    handle.cancel();
    EXPECT_EQ(handle.wait().finish_reason, FinishReason::kCancelled);
  }
  EXPECT_EQ(engine->run(prompt_of(10, 5)).token_ids, expected);
}

/// A communicator that throws at one of its ops.
class Failing final : public Communicator {
 public:
  Failing(std::unique_ptr<Communicator> inner, int ops_left, bool lost)
      : inner_(std::move(inner)), ops_left_(ops_left), lost_(lost) {}
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  void all_reduce(const MatrixView& m) override { count(), inner_->all_reduce(m); }
  void reduce_scatter(const MatrixView& m) override { count(), inner_->reduce_scatter(m); }
  void all_gather(const MatrixView& m) override { count(), inner_->all_gather(m); }
  void all_gather(const MatrixView& mine, const MatrixView& all) override {
    count(), inner_->all_gather(mine, all);
  }
  void broadcast(std::vector<std::byte>& message) override { count(), inner_->broadcast(message); }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    count(), inner_->all_gather(mine, all);
  }
  void gather(std::span<const std::byte> mine, std::vector<std::vector<std::byte>>& all) override {
    count(), inner_->gather(mine, all);
  }
  void check() override { inner_->check(); }
  void fail(const std::string& why) override { inner_->fail(why); }
  bool recover() override { return inner_->recover() && !lost_; }

 private:
  void count() {
    if (ops_left_-- == 0) throw std::runtime_error("injected");
  }
  std::unique_ptr<Communicator> inner_;
  int ops_left_;
  const bool lost_;  // the group does not survive a failure
};

/// The ranks of a model, one of which fails at its op number `op`.
std::vector<Rank> failing_ranks(const test::ModelDir& dir, Ranks size, int failing, int op,
                                bool lost) {
  const auto [tp, cp] = size;
  const ModelConfig model = read_model_config(dir.path(), "", 0.0, config_dialect);
  EngineConfig config = resolve_engine_config(config_of(tp, cp), model);
  auto backends = make_backends("cpu", "float32", 1, tp);
  take_device_defaults(config, model, *backends.front());
  const MemoryPlan plan = make_memory_plan(config, model, *backends.back(), int64_t{1} << 30);
  const auto checkpoint = Checkpoint::open(dir.path());
  auto ends = make_local_communicators(tp);
  std::vector<Rank> ranks(static_cast<size_t>(tp));
  for (int r = 0; r < tp; ++r) {
    const auto i = static_cast<size_t>(r);
    ranks[i].backend = std::move(backends[i]);
    ranks[i].communicator =
        std::make_unique<Failing>(std::move(ends[i]), r == failing ? op : -1, lost);
    const Shard shard(model, r, tp, cp);
    DecoderWeights weights =
        load_weights(model, *checkpoint, *ranks[i].backend, shard, LinearDType::kNative, 1, {});
    ranks[i].cache = {ranks[i].backend->allocate(plan.kv_bytes), kv_shape(config, model, shard),
                      plan.num_blocks, plan.block_bytes};
    ranks[i].decoder = std::make_unique<Decoder>(
        model, shard, *ranks[i].backend, *ranks[i].communicator, std::move(weights),
        decoder_limits(config, ranks[i].backend->traits()));
  }
  return ranks;
}

StepInput step_of(int64_t tokens) {
  auto profile = std::make_shared<RopeProfile>();
  profile->inv_freq = {1.0, 0.1, 0.01, 0.001};
  StepInput step;
  for (int64_t i = 0; i < tokens; ++i) step.token_ids.push_back(static_cast<int32_t>(i * 5 % 97));
  step.cu_seqlens = {0, tokens};
  step.first_position = {0};
  step.block_tables = {{0}};
  step.profiles = {profile};
  return step;
}

/// The logits of the last row, as rank 0 has them.
std::vector<float> logits_of(RankGroup& ranks) {
  ranks.forward(step_of(10), false, [](int64_t) { return true; });
  const MatrixView logits = ranks.logits(std::vector<int64_t>{9});
  const auto* row = logits.row<const float>(0);
  return {row, row + logits.cols};
}

TEST(TensorParallel, AFailedRankEndsTheStepAndTheGroupGoesOn) {
  const test::ModelDir model(cases().front().shape);
  // Ops of a forward: the command, the embedding, and of two layers two sums and an agreement each,
  // with shared contexts a gathering too; then the command for logits and their gathering.
  for (const auto& [size, ops] : {std::pair{Ranks{4}, 10}, {Ranks{4, 2}, 12}}) {
    RankGroup whole(failing_ranks(model, size, -1, 0, false));
    const std::vector<float> expected = logits_of(whole);
    for (int failing = 0; failing < 4; ++failing) {
      for (int op = 0; op < ops; ++op) {
        RankGroup ranks(failing_ranks(model, size, failing, op, false));
        try {
          logits_of(ranks);
          ADD_FAILURE() << "rank " << failing << " did not fail at op " << op;
        } catch (const ParallelError& error) {
          EXPECT_NE(failing, 0);
          EXPECT_EQ(error.what(), "rank " + std::to_string(failing) + " of 4: injected");
        } catch (const std::runtime_error& error) {
          EXPECT_EQ(failing, 0) << error.what();
        }
        EXPECT_EQ(logits_of(ranks), expected);
      }
    }
  }
}

TEST(TensorParallel, ALostGroupRefusesEveryCallAndCloses) {
  const test::ModelDir model(cases().front().shape);
  for (const int failing : {0, 2}) {
    RankGroup ranks(failing_ranks(model, {4}, failing, 3, true));
    EXPECT_THROW(logits_of(ranks), std::runtime_error);
    for (int i = 0; i < 2; ++i) {
      expect_throw<ParallelError>([&] { logits_of(ranks); }, "load the engine again");
    }
  }
}

}  // namespace
}  // namespace longspan
