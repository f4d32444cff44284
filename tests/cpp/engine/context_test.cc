#include "longspan/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/files.h"
#include "longspan/engine.h"
#include "longspan/error.h"
#include "support/small_engine.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

using test::expect_throw;
using test::ModelDir;
using test::prompt_of;
using test::TempDir;

constexpr int64_t kTokens = 150;  // two blocks of 64 and a part

/// Heads that 1, 2 and 4 ranks share out, the last two by having one twice.
const test::TinyLlama kShape = {.intermediate_size = 96, .num_heads = 8, .num_kv_heads = 2};

/// A model, and the ranks that can share it: how many, and how many of them share the keys of a
/// sequence.
struct SharedModel {
  test::TinyLlama shape;
  std::vector<std::pair<int, int>> ranks;
};
const SharedModel kSharedModels[] = {
    {kShape, {{1, 1}, {2, 1}, {4, 1}, {2, 2}, {4, 2}, {4, 4}}},
    // SmolLM2's heads.
    {{.intermediate_size = 96, .num_heads = 9, .num_kv_heads = 3},
     {{1, 1}, {3, 1}, {2, 2}, {3, 3}, {6, 2}}},
};

EngineConfig config_of(const std::string& dtype = "float32", const std::string& kv = "auto",
                       int tp = 1, int cp = 1) {
  EngineConfig config = test::small_config();
  config.device = "cpu";
  config.dtype = dtype;
  config.kv_cache_dtype = kv;
  config.tp = tp;
  config.cp = cp;
  config.enable_prefix_caching = true;
  return config;
}

std::vector<int32_t> context_ids() { return prompt_of(kTokens, 0).input_ids; }

/// What an engine makes of the context and some more tokens: logits, and how much was cached.
RequestOutput go_on(Engine& engine) {
  Request request = prompt_of(kTokens + 20, 0);
  request.kind = RequestKind::kLogits;
  request.logit_positions = {kTokens, kTokens + 19};
  return engine.run(request);
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void expect_near(const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], tolerance) << i;
}

TEST(Context, GoesOnWithTheBitsOfAWarmCache) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  for (const std::string dtype : {"float32", "bfloat16"}) {
    for (const std::string kv : {"auto", "int8", "fp8", "int8_fp8", "int8_int4", "int4"}) {
      SCOPED_TRACE(dtype + " " + kv);
      const auto warm = Engine::load(model.path(), config_of(dtype, kv));
      const Context saved = warm->save_context(context_ids(), path);
      EXPECT_EQ(saved.token_ids, context_ids());
      EXPECT_EQ(saved.file_bytes, static_cast<int64_t>(std::filesystem::file_size(path)));
      const RequestOutput expected = go_on(*warm);
      EXPECT_EQ(expected.cached_tokens, kTokens);
      for (const int block_len : {64, 128, 256}) {
        EngineConfig config = config_of(dtype, kv);
        config.cache_block_seq_len = block_len;
        const auto engine = Engine::load(model.path(), config);
        const Context context = engine->load_context(path);
        EXPECT_EQ(context.token_ids, saved.token_ids);
        EXPECT_EQ(context.rope_profile, saved.rope_profile);
        EXPECT_EQ(context.file_bytes, saved.file_bytes);
        const RequestOutput got = go_on(*engine);
        EXPECT_EQ(got.cached_tokens, kTokens);
        EXPECT_EQ(got.logits, expected.logits);
      }
    }
  }
}

// A file goes from each group to the next, round to the first. All write the same bits as what they
// read, and go on from them alike, so that what one saves any other loads.
TEST(Context, OfAnyNumberOfRanksIsThatOfAnyOther) {
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  for (const auto& [shape, groups] : kSharedModels) {
    const ModelDir model(shape);
    for (const std::string kv : {"auto", "int8_int4"}) {
      for (size_t from = 0; from < groups.size(); ++from) {
        const auto engine_of = [&](size_t i) {
          const auto [tp, cp] = groups[i % groups.size()];
          return Engine::load(model.path(), config_of("float32", kv, tp, cp));
        };
        SCOPED_TRACE(testing::Message() << kv << " of " << shape.num_heads << " heads, from tp "
                                        << groups[from].first << " cp " << groups[from].second);
        const auto saver = engine_of(from);
        saver->save_context(context_ids(), path);
        const RequestOutput expected = go_on(*saver);
        const std::string saved = read_file(path);
        const auto engine = engine_of(from + 1);
        engine->load_context(path);
        const RequestOutput got = go_on(*engine);
        EXPECT_EQ(got.cached_tokens, kTokens);
        // Ranks add their sums in another order.
        expect_near(got.logits, expected.logits, kv == "auto" ? 2e-5 : 2e-3);
        engine->save_context(context_ids(), path);
        EXPECT_TRUE(read_file(path) == saved) << "not the same bits";
      }
    }
  }
}

TEST(Context, GoesFromFormatToFormatByItsNumbers) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  const auto exact = Engine::load(model.path(), config_of());
  const std::vector<float> expected = go_on(*exact).logits;
  struct Format {
    const char* dtype;
    const char* kv;
    double tolerance;  ///< of logits of the order of 1
  };
  const Format formats[] = {{"float32", "auto", 1e-5},
                            {"bfloat16", "auto", 0.05},
                            {"float32", "int8", 0.05},
                            {"float32", "fp8", 0.2},
                            {"float32", "int4", 0.5}};
  for (const Format& from : formats) {
    Engine::load(model.path(), config_of(from.dtype, from.kv))->save_context(context_ids(), path);
    for (const Format& to : formats) {
      SCOPED_TRACE(testing::Message()
                   << from.dtype << " " << from.kv << " to " << to.dtype << " " << to.kv);
      const auto engine = Engine::load(model.path(), config_of(to.dtype, to.kv));
      engine->load_context(path);
      const RequestOutput got = go_on(*engine);
      EXPECT_EQ(got.cached_tokens, kTokens);
      expect_near(got.logits, expected, from.tolerance + to.tolerance);
    }
  }
}

TEST(Context, WhatIsCachedIsNeitherComputedNorReadAgain) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  const auto engine = Engine::load(model.path(), config_of());
  engine->save_context(context_ids(), path);
  const int64_t computed = engine->metrics().prefilled_tokens;
  EXPECT_EQ(computed, kTokens);
  const int64_t cached = engine->metrics().cached_blocks;
  std::vector<int64_t> moved;
  engine->save_context(context_ids(), path, std::nullopt, 0,
                       [&](const ContextProgress& p) { moved.push_back(p.moved); });
  EXPECT_EQ(engine->metrics().prefilled_tokens, computed + 1);  // one row is always computed
  EXPECT_EQ(moved.back(), kTokens);
  engine->load_context(path);
  EXPECT_EQ(engine->metrics().cached_blocks, cached);
  EXPECT_EQ(engine->metrics().free_blocks, engine->metrics().total_blocks);
}

/// Saves with a checkpoint every 40 tokens until the third is under way.
void save_until_it_dies(Engine& engine, const std::string& path,
                        const std::optional<RopeLength>& rope_length = std::nullopt) {
  EXPECT_THROW(engine.save_context(context_ids(), path, rope_length, 40,
                                   [](const ContextProgress& p) {
                                     if (p.computed > 80) throw std::runtime_error("died");
                                   }),
               std::runtime_error);
}

TEST(Context, GoesOnFromWhatWasSavedOnTheWay) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  for (const std::string kv : {"auto", "int8_int4"}) {
    for (const auto& [tp, cp] : {std::pair{1, 1}, {2, 2}}) {
      SCOPED_TRACE(testing::Message() << kv << " tp " << tp << " cp " << cp);
      const auto load = [&, tp = tp, cp = cp] {
        return Engine::load(model.path(), config_of("float32", kv, tp, cp));
      };
      const int64_t bytes = load()->save_context(context_ids(), path + "-whole").file_bytes;
      save_until_it_dies(*load(), path);
      EXPECT_EQ(load()->load_context(path).token_ids.size(), 80U);

      const auto engine = load();
      std::vector<int64_t> computed;
      const Context saved =
          engine->save_context(context_ids(), path, std::nullopt, 50,
                               [&](const ContextProgress& p) { computed.push_back(p.computed); });
      EXPECT_EQ(engine->metrics().prefilled_tokens, kTokens - 80);
      EXPECT_TRUE(std::ranges::is_sorted(computed));
      EXPECT_EQ(computed.back(), kTokens);
      EXPECT_EQ(saved.token_ids, context_ids());
      EXPECT_EQ(saved.file_bytes, bytes);
      EXPECT_TRUE(read_file(path) == read_file(path + "-whole")) << "not the same bits";

      const auto again = load();
      EXPECT_EQ(again->save_context(context_ids(), path, std::nullopt, 50).file_bytes, bytes);
      EXPECT_EQ(again->metrics().prefilled_tokens, 0);
      std::filesystem::remove(path);
    }
  }
}

TEST(Context, GoesOnFromNothingElse) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  EngineConfig config = config_of();
  config.rope_scaling_factor = 4.0;  // past 64 tokens each length has its own
  const RopeLength fixed = {RopeLengthPolicy::kFixed, 300};
  save_until_it_dies(*Engine::load(model.path(), config), path, fixed);
  const std::string before = read_file(path);
  const auto refused = [&](const EngineConfig& c, const std::vector<int32_t>& ids,
                           const RopeLength& length, const std::string& why) {
    const auto engine = Engine::load(model.path(), c);
    expect_throw<CheckpointError>([&] { engine->save_context(ids, path, length, 40); }, why);
    EXPECT_EQ(engine->metrics().prefilled_tokens, 0);
    EXPECT_EQ(engine->metrics().cached_blocks, 0);
    EXPECT_TRUE(read_file(path) == before);
  };
  std::vector<int32_t> other = context_ids();
  other[79] ^= 1;
  refused(config, other, fixed, "context: token_ids: expected a beginning of the context");
  other = context_ids();
  other.resize(79);
  refused(config, other, fixed, "context: token_ids: expected a beginning of the context");
  refused(config, context_ids(), {RopeLengthPolicy::kFixed, 301}, "context: rope: expected");
  EngineConfig bytes = config;
  bytes.kv_cache_dtype = "int8";
  refused(bytes, context_ids(), fixed, "context: kv_cache_dtype: expected");
  const auto engine = Engine::load(model.path(), config);
  expect_throw<InvalidArgument>([&] { engine->save_context(context_ids(), path, fixed, -1); },
                                "checkpoint_tokens: expected an integer >= 0, got -1");
  EXPECT_EQ(engine->save_context(context_ids(), path, fixed, 40).token_ids, context_ids());
}

TEST(Context, KeepsTheProfileOfItsLength) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  EngineConfig config = config_of();
  config.rope_scaling_factor = 4.0;  // past 64 tokens each length has its own
  config.rope_length = {RopeLengthPolicy::kBucket, 0};
  const auto engine = Engine::load(model.path(), config);
  const Context saved = engine->save_context(context_ids(), path);
  EXPECT_EQ(saved.rope_profile.length, 256);
  EXPECT_EQ(
      engine->save_context(context_ids(), path + "2", RopeLength{RopeLengthPolicy::kFixed, 300})
          .rope_profile.length,
      300);
  const std::vector<float> expected = go_on(*engine).logits;
  const auto other = Engine::load(model.path(), config);
  EXPECT_EQ(other->load_context(path + "2").rope_profile.length, 300);
  EXPECT_EQ(go_on(*other).cached_tokens, 0);
  EXPECT_EQ(Engine::load(model.path(), config)->load_context(path).rope_profile,
            saved.rope_profile);
  other->load_context(path);
  Request request = prompt_of(kTokens + 20, 0);
  request.kind = RequestKind::kLogits;
  request.logit_positions = {kTokens, kTokens + 19};
  request.rope_length = RopeLength{RopeLengthPolicy::kFixed, 300};
  EXPECT_EQ(other->run(request).cached_tokens, kTokens);

  config.rope_scaling_factor = 2.0;
  expect_throw<CheckpointError>([&] { Engine::load(model.path(), config)->load_context(path); },
                                "rope.inv_freq: expected");
}

TEST(Context, IsRefusedWhereItDoesNotBelong) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  Engine::load(model.path(), config_of())->save_context(context_ids(), path);
  const auto load = [&](const ModelDir& where, const EngineConfig& config) {
    Engine::load(where.path(), config)->load_context(path);
  };
  EngineConfig config = config_of();
  config.enable_prefix_caching = false;
  expect_throw<InvalidArgument>([&] { load(model, config); }, "enable_prefix_caching");
  config = config_of();
  config.session_len = kTokens - 1;
  expect_throw<ContextTooLong>([&] { load(model, config); }, "150");
  test::TinyLlama other = kShape;
  other.num_kv_heads = 4;
  expect_throw<CheckpointError>(
      [&] { load(ModelDir(other), config_of()); },
      "tensor \"keys\": expected F32 [2, 4, 150, 8], got F32 [2, 2, 150, 8]");
  other = kShape;
  other.vocab_size = 120;  // other weights of the same shape of cache
  expect_throw<CheckpointError>([&] { load(ModelDir(other), config_of()); }, "model: expected");
  expect_throw<CheckpointError>(
      [&] { Engine::load(model.path(), config_of())->load_context(dir.path() + "/none"); },
      "none: expected a readable file");

  // A running request is promised all blocks but two.
  config = config_of();
  config.session_len = 4000;
  config.cache_max_entry_count = 64;
  const auto engine = Engine::load(model.path(), config);
  const RequestHandle running = engine->submit(prompt_of(1, 3950, 1));
  running.wait_for_tokens(0, std::chrono::seconds(60));
  expect_throw<CapacityError>([&] { engine->load_context(path); },
                              "expected 3 free blocks of the KV cache, got 2");
  running.cancel();
  running.wait();
  EXPECT_EQ(engine->load_context(path).token_ids, context_ids());
}

TEST(Context, SavingEndsWithAnExceptionAndLeavesNothing) {
  const ModelDir model(kShape);
  const TempDir dir;
  const auto engine = Engine::load(model.path(), config_of());
  const auto files = [&] {
    return std::distance(std::filesystem::directory_iterator(dir.path()), {});
  };
  expect_throw<CheckpointError>(
      [&] { engine->save_context(context_ids(), dir.path() + "/none/context"); },
      "expected a file that can be written");
  EXPECT_EQ(engine->metrics().steps, 0);  // before any work
  expect_throw<std::runtime_error>(
      [&] {
        engine->save_context(context_ids(), dir.path() + "/context", std::nullopt, 0,
                             [](const ContextProgress&) { throw std::runtime_error("enough"); });
      },
      "enough");
  EXPECT_EQ(files(), 0);
  engine->save_context(context_ids(), dir.path() + "/context");
  EXPECT_EQ(files(), 1);
  expect_throw<std::runtime_error>(
      [&] {
        Engine::load(model.path(), config_of())
            ->load_context(dir.path() + "/context",
                           [](const ContextProgress&) { throw std::runtime_error("enough"); });
      },
      "enough");
  expect_throw<InvalidArgument>([&] { engine->save_context({}, dir.path() + "/x"); }, "input_ids");
  expect_throw<ContextTooLong>(
      [&] { engine->save_context(prompt_of(600, 0).input_ids, dir.path() + "/x"); }, "600");
  EXPECT_EQ(files(), 1);
  EXPECT_EQ(engine->metrics().free_blocks, engine->metrics().total_blocks);
}

TEST(Context, RequestsGoOnMeanwhileAndCloseEndsIt) {
  const ModelDir model(kShape);
  const TempDir dir;
  const std::string path = dir.path() + "/context";
  const auto engine = Engine::load(model.path(), config_of());
  const std::vector<int32_t> expected = engine->run(prompt_of(30, 20, 3)).token_ids;
  std::thread requests([&] {
    for (int i = 0; i < 10; ++i) {
      EXPECT_EQ(engine->run(prompt_of(30, 20, 3)).token_ids, expected);
    }
  });
  for (int i = 0; i < 10; ++i) {
    engine->save_context(context_ids(), path);
    engine->load_context(path);
  }
  requests.join();
  std::atomic<int> rounds = 0;
  std::thread saver([&] {
    EXPECT_THROW(for (;; ++rounds) { engine->save_context(context_ids(), path); }, EngineClosed);
  });
  while (rounds < 3) std::this_thread::yield();
  engine->close();
  saver.join();
  EXPECT_THROW(engine->load_context(path), EngineClosed);
}

/// A saved file with a piece of its text put in place of another of the same length.
struct Damage {
  const char* was;
  const char* is;
  const char* message;
};

TEST(Context, NothingInAFileIsTrusted) {
  const ModelDir model(kShape);
  const TempDir dir;
  const auto engine = Engine::load(model.path(), config_of("bfloat16", "int8_fp8"));
  engine->save_context(context_ids(), dir.path() + "/good");
  const std::string good = read_file(dir.path() + "/good");
  const auto fresh = Engine::load(model.path(), config_of("bfloat16", "int8_fp8"));
  const auto expect_refused = [&](const std::string& bytes, const std::string& part) {
    const std::string path = dir.write("bad", bytes);
    expect_throw<CheckpointError>([&] { fresh->load_context(path); }, part);
    EXPECT_EQ(fresh->metrics().cached_blocks, 0);
    EXPECT_EQ(fresh->metrics().free_blocks, fresh->metrics().total_blocks);
  };
  const Damage damages[] = {
      {"longspan context 3", "longspan context 2", "format: expected \"longspan context 3\""},
      {"\"format\":", "\"farmot\":", "format: expected the metadata"},
      {"int8_fp8", "int8_fp9", "kv_cache_dtype: expected one"},
      {"\"int8_fp8\"", "\"int8\"    ",
       "tensor \"values\": expected I8 [2, 2, 150, 8], got F8_E4M3"},
      {"\"rope.length\":\"150\"", "\"rope.length\":\"1x0\"", "rope.length: expected an integer"},
      {"\"rope.length\":\"150\"", "\"rope.length\":\"-15\"", "rope.length: expected an integer"},
      {"factor\":\"1\"", "factor\":\"e\"", "rope.attention_factor: expected a number"},
      {"factor\":\"1\"", "factor\":\"2\"", "rope.attention_factor: expected 1"},
      {"logn_length\":\"0\"", "logn_length\":\"9\"", "rope.logn_length: expected 0"},
      {"\"token_ids\"", "\"token_idz\"", "expected a tensor \"token_ids\""},
      {"[150]}", "[75,2]", "header"},
      {"[2,2,150,8]", "[2,2,150,9]", "data_offsets"},
      {"\"key_scales\":", "\"key_scalez\":", "expected a tensor \"key_scales\""},
      {"\"I32\"", "\"U32\"", "tensor \"token_ids\": expected I32 [tokens], got U32"},
      {"\"F64\"", "\"I64\"", "tensor \"rope.inv_freq\": expected F64 [pairs], got I64"},
  };
  for (const Damage& damage : damages) {
    SCOPED_TRACE(damage.is);
    std::string bytes = good;
    const size_t at = bytes.find(damage.was);
    ASSERT_NE(at, std::string::npos);
    bytes.replace(at, std::string(damage.is).size(), damage.is);
    expect_refused(bytes, damage.message);
  }
  for (const size_t left : {size_t{0}, size_t{7}, size_t{100}, good.size() - 1}) {
    expect_refused(good.substr(0, left), left == 0 ? "truncated" : "");
  }
  uint64_t header = 0;
  std::memcpy(&header, good.data(), sizeof(header));
  const size_t ids = 8 + header + 8 * 4;  // behind four frequencies
  const size_t scales = ids + kTokens * 4;
  const size_t values = good.size() - 2 * 2 * kTokens * 8;
  std::string bytes = good;
  bytes[ids + 4 * 5 + 3] = '\x7f';
  expect_refused(bytes, "token_ids[5]: expected a token id in [0, 97)");
  bytes = good;
  bytes.replace(8 + header, 8, 8, '\xff');
  expect_refused(bytes, "rope.inv_freq: expected 1");
  bytes = good;
  bytes.replace(scales + 2, 2, "\x80\x7f");
  expect_refused(bytes, "tokens 0 to 63: expected finite keys and values");
  bytes = good;
  bytes[values + 140 * 8] = '\x7f';
  expect_refused(bytes, "tokens 128 to 149: expected finite keys and values");
  dir.write("bad", good);
  EXPECT_EQ(fresh->load_context(dir.path() + "/bad").token_ids, context_ids());
}

}  // namespace
}  // namespace longspan
