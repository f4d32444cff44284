#include "engine/lengths.h"

#include <gtest/gtest.h>

#include "longspan/error.h"

namespace longspan {
namespace {

constexpr int64_t kNative = 100;
constexpr int64_t kVocab = 50;

Request prompt_of(int64_t tokens, std::optional<int64_t> max_new_tokens) {
  Request request;
  request.input_ids.assign(static_cast<size_t>(tokens), 1);
  request.generation.max_new_tokens = max_new_tokens;
  return request;
}

RequestLengths resolve(const Request& request, const EngineConfig& config,
                       int64_t kv_capacity = 1 << 20) {
  return resolve_lengths(request, config, kNative, kVocab, kv_capacity);
}

EngineConfig session(int64_t tokens, RopeLength rope = {}) {
  EngineConfig config;
  config.session_len = tokens;
  config.rope_length = rope;
  return config;
}

TEST(Lengths, RequestPolicyCountsPromptAndOutputUpToTheSession) {
  const RequestLengths fits = resolve(prompt_of(80, 40), session(200));
  EXPECT_EQ(fits.max_new_tokens, 40);
  EXPECT_EQ(fits.rope_length, 120);
  EXPECT_FALSE(fits.clamped);
  const RequestLengths clamped = resolve(prompt_of(180, 40), session(200));
  EXPECT_EQ(clamped.max_new_tokens, 20);
  EXPECT_EQ(clamped.rope_length, 200);
  EXPECT_TRUE(clamped.clamped);
  const RequestLengths open = resolve(prompt_of(150, std::nullopt), session(200));
  EXPECT_EQ(open.max_new_tokens, 50);
  EXPECT_TRUE(open.clamped);  // what ends it is the session
}

TEST(Lengths, PoliciesFixTheProfileLength) {
  const Request request = prompt_of(150, 30);
  EXPECT_EQ(resolve(request, session(400, {RopeLengthPolicy::kPrompt})).rope_length, 150);
  EXPECT_EQ(resolve(request, session(400, {RopeLengthPolicy::kSession})).rope_length, 400);
  EXPECT_EQ(resolve(request, session(400, {RopeLengthPolicy::kBucket})).rope_length, 200);
  EXPECT_EQ(resolve(request, session(400, {RopeLengthPolicy::kFixed, 300})).rope_length, 300);
  EXPECT_EQ(resolve(prompt_of(60, 40), session(400, {RopeLengthPolicy::kBucket})).rope_length, 100);
  EXPECT_EQ(resolve(prompt_of(60, 41), session(400, {RopeLengthPolicy::kBucket})).rope_length, 200);
}

TEST(Lengths, AFixedLengthBoundsTheRequest) {
  const EngineConfig config = session(400, {RopeLengthPolicy::kFixed, 160});
  const RequestLengths lengths = resolve(prompt_of(150, 30), config);
  EXPECT_EQ(lengths.max_new_tokens, 10);
  EXPECT_TRUE(lengths.clamped);
  EXPECT_THROW(resolve(prompt_of(160, 30), config), ContextTooLong);
}

TEST(Lengths, PromptsThatLeaveNoRoomAreRefused) {
  EXPECT_NO_THROW(resolve(prompt_of(199, 5), session(200)));
  try {
    resolve(prompt_of(200, 5), session(200), 640);
    FAIL();
  } catch (const ContextTooLong& error) {
    EXPECT_EQ(error.prompt_tokens(), 200);
    EXPECT_EQ(error.session_len(), 200);
    EXPECT_EQ(error.kv_capacity(), 640);
  }
  EXPECT_THROW(resolve(prompt_of(200, std::nullopt), session(200)), ContextTooLong);
  EXPECT_NO_THROW(resolve(prompt_of(200, 0), session(200)));
  EXPECT_THROW(resolve(prompt_of(201, 0), session(200)), ContextTooLong);
}

TEST(Lengths, ScoringUsesTheIdsAlone) {
  Request request = prompt_of(150, 512);
  request.kind = RequestKind::kScore;
  const RequestLengths lengths = resolve(request, session(150));
  EXPECT_EQ(lengths.max_new_tokens, 0);
  EXPECT_EQ(lengths.rope_length, 150);
  EXPECT_FALSE(lengths.clamped);
  EXPECT_THROW(resolve(request, session(149)), ContextTooLong);
  request.input_ids.resize(1);
  EXPECT_THROW(resolve(request, session(150)), InvalidArgument);
}

TEST(Lengths, WhatCanNeverFitIsRefusedWithTheLargestThatWould) {
  try {
    resolve(prompt_of(100, 100), session(1000), 128);
    FAIL();
  } catch (const CapacityError& error) {
    EXPECT_NE(std::string(error.what()).find("128"), std::string::npos) << error.what();
  }
}

TEST(Lengths, BadOptionsAndIdsAreNamed) {
  const auto expect_named = [](const Request& request, const std::string& name) {
    try {
      resolve(request, session(200));
      ADD_FAILURE() << name << " was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(std::string(error.what()).rfind(name, 0), 0U) << error.what();
    }
  };
  const Request good = prompt_of(4, 4);
  Request bad = good;
  bad.generation.temperature = 0.0;
  expect_named(bad, "temperature");
  bad = good;
  bad.generation.top_p = 1.5;
  expect_named(bad, "top_p");
  bad = good;
  bad.generation.top_k = -1;
  expect_named(bad, "top_k");
  bad = good;
  bad.generation.max_new_tokens = -1;
  expect_named(bad, "max_new_tokens");
  bad = good;
  bad.input_ids[2] = kVocab;
  expect_named(bad, "input_ids[2]");
  bad = good;
  bad.kind = RequestKind::kLogits;
  expect_named(bad, "logit_positions");
  bad.logit_positions = {1, 1};
  expect_named(bad, "logit_positions");
  bad.logit_positions = {4};
  expect_named(bad, "logit_positions");
}

}  // namespace
}  // namespace longspan
