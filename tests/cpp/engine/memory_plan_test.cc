#include "engine/memory_plan.h"

#include <gtest/gtest.h>

#include <cmath>

#include "backend/registry.h"
#include "longspan/error.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

EngineConfig f32_config() {
  EngineConfig config;
  config.dtype = "float32";
  config.num_threads = 1;
  return config;
}

TEST(MemoryPlan, FitsWhatItSaysItFits) {
  const test::ModelDir model;
  EngineConfig config = f32_config();
  config.session_len = 1000;
  config.max_batch_size = 1;
  const MemoryPlan roomy = plan_memory(model.path(), config, int64_t{1} << 30);
  EXPECT_TRUE(roomy.fits);
  EXPECT_EQ(roomy.num_blocks, 16);  // ceil(1000 / 64): one sequence never uses more
  EXPECT_GE(roomy.kv_capacity, 1000);
  EXPECT_EQ(roomy.kv_bytes, roomy.num_blocks * roomy.block_bytes);
  EXPECT_LE(roomy.total_bytes(), int64_t{1} << 30);

  config.session_len = int64_t{1} << 30;
  const MemoryPlan tight = plan_memory(model.path(), config, int64_t{1} << 30);
  EXPECT_FALSE(tight.fits);
  config.session_len = tight.max_session_len;
  EXPECT_TRUE(plan_memory(model.path(), config, int64_t{1} << 30).fits);
}

TEST(MemoryPlan, TakesAnIntegerAsBlocks) {
  const test::ModelDir model;
  EngineConfig config = f32_config();
  config.cache_max_entry_count = 7;
  const MemoryPlan plan = plan_memory(model.path(), config, int64_t{1} << 30);
  EXPECT_EQ(plan.num_blocks, 7);
  EXPECT_EQ(plan.kv_capacity, 7 * 64);
  EXPECT_EQ(plan.max_session_len, 7 * 64);
}

TEST(MemoryPlan, FormatsOfTheCacheMakeBlocksSmaller) {
  const test::ModelDir model;
  EngineConfig config = f32_config();
  config.dtype = "bfloat16";
  const auto block_bytes = [&](const char* format) {
    config.kv_cache_dtype = format;
    return static_cast<double>(plan_memory(model.path(), config, int64_t{1} << 30).block_bytes);
  };
  // Of a head of d dims: 2 d bytes; d + 2; keys of int4 3 d / 4 + 2, values d / 2 + 4 for each 32.
  const double native = block_bytes("auto");
  EXPECT_LT(block_bytes("int8"), 0.6 * native);
  EXPECT_EQ(block_bytes("int8"), block_bytes("fp8"));
  EXPECT_EQ(block_bytes("int8"), block_bytes("int8_fp8"));
  EXPECT_LT(block_bytes("int8_int4"), block_bytes("int8"));
  EXPECT_LT(block_bytes("int4"), block_bytes("int8_int4"));
  EXPECT_LT(block_bytes("int4"), 0.4 * native);
}

TEST(MemoryPlan, NothingFitsInNothing) {
  const test::ModelDir model;
  const MemoryPlan plan = plan_memory(model.path(), f32_config(), 1);
  EXPECT_FALSE(plan.fits);
  EXPECT_EQ(plan.max_session_len, 0);
}

TEST(MemoryPlan, BadOptionsAreNamed) {
  const test::ModelDir model;
  const auto expect_named = [&](auto set, const std::string& name) {
    EngineConfig config = f32_config();
    set(config);
    try {
      plan_memory(model.path(), config);
      ADD_FAILURE() << name << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).rfind(name, 0), 0U) << error.what();
    }
  };
  expect_named([](EngineConfig& c) { c.session_len = -1; }, "session_len");
  expect_named([](EngineConfig& c) { c.max_batch_size = 0; }, "max_batch_size");
  expect_named([](EngineConfig& c) { c.cache_max_entry_count = 0; }, "cache_max_entry_count");
  expect_named([](EngineConfig& c) { c.cache_max_entry_count = 1.5; }, "cache_max_entry_count");
  expect_named([](EngineConfig& c) { c.cache_max_entry_count = NAN; }, "cache_max_entry_count");
  expect_named([](EngineConfig& c) { c.cache_block_seq_len = 100; }, "cache_block_seq_len");
  expect_named([](EngineConfig& c) { c.kv_cache_dtype = "int3"; },
               "kv_cache_dtype: expected one of \"auto\", \"int8\"");
  expect_named([](EngineConfig& c) { c.prefill_attention = "int7"; },
               "prefill_attention: expected one of \"auto\", \"int8\", \"int8_fp8\"");
  expect_named([](EngineConfig& c) { c.prefill_attention = "int8"; },
               "prefill_attention: expected one of \"auto\" on cpu (");
  expect_named([](EngineConfig& c) { c.prefill_attention = "int8_fp8"; },
               "prefill_attention: expected one of \"auto\" on cpu (");
  expect_named([](EngineConfig& c) { c.linear_dtype = "fp4"; },
               "linear_dtype: expected one of \"auto\", \"int8\"");
  expect_named([](EngineConfig& c) { c.linear_dtype = "int8"; },
               "linear_dtype: expected one of \"auto\" on cpu (");
  expect_named([](EngineConfig& c) { c.max_prefill_token_num = -1; }, "max_prefill_token_num");
  expect_named([](EngineConfig& c) { c.tp = 5; }, "tp");
  expect_named([](EngineConfig& c) { c.rope_length = {RopeLengthPolicy::kFixed, 0}; },
               "rope_length");
  expect_named([](EngineConfig& c) { c.rope_scaling_factor = 0.5; }, "rope_scaling_factor");
  expect_named([](EngineConfig& c) { c.dtype = "int3"; }, "dtype");
  expect_named([](EngineConfig& c) { c.device = "tpu"; }, "device");
  expect_named([](EngineConfig& c) { c.num_threads = -1; }, "num_threads");
}

}  // namespace
}  // namespace longspan
