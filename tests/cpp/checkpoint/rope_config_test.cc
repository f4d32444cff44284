#include <cmath>
#include <nlohmann/json.hpp>

#include "checkpoint/model_config.h"
#include "longspan/error.h"
#include "longspan/rope.h"
#include "support/expect_throw.h"

namespace longspan {
namespace {

using nlohmann::json;
using test::expect_throw;

/// A config with these members on top of what every config has.
std::string config(const json& members) {
  json all = {
      {"hidden_size", 4096}, {"num_attention_heads", 32}, {"max_position_embeddings", 262144}};
  all.update(members);
  return all.dump();
}

TEST(RopeConfig, EverySpellingMeansTheSame) {
  const RopeProfile expected = rope_profile_from_config(
      config({{"rope_theta", 5e7}, {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.5}}}}),
      1'000'000);
  EXPECT_NEAR(expected.base, 4.1535e8, 1e4);
  EXPECT_EQ(expected.inv_freq.size(), 64U);
  EXPECT_EQ(expected.native_length, 262144);
  const json spellings[] = {
      {{"rope_theta", 5e7}, {"rope_scaling", {{"rope_type", "dynamic"}, {"factor", 2.5}}}},
      {{"rope_theta", 50000000}, {"rope_parameters", {{"rope_type", "dynamic"}, {"factor", 2.5}}}},
      {{"rope_parameters", {{"type", "dynamic"}, {"factor", 2.5}, {"rope_theta", 5e7}}}},
      {{"rope_theta", 1.0},
       {"rope_scaling", nullptr},
       {"rope_parameters", {{"rope_type", "dynamic"}, {"factor", 2.5}, {"rope_theta", 5e7}}}},
      {{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5e7}}},
       {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.5}}}},
      {{"rope_theta", 5e7},
       {"head_dim", 128},
       {"partial_rotary_factor", 1.0},
       {"rope_scaling",
        {{"rope_type", "dynamic"},
         {"type", "dynamic"},
         {"factor", 2.5},
         {"partial_rotary_factor", 1}}}},
  };
  for (const json& spelling : spellings) {
    EXPECT_EQ(rope_profile_from_config(config(spelling), 1'000'000), expected) << spelling;
  }
}

TEST(RopeConfig, NoDictionaryIsTheDefault) {
  for (const json& members : {json::object(), json{{"rope_scaling", nullptr}},
                              json{{"rope_parameters", json::object()}}}) {
    const RopeProfile profile = rope_profile_from_config(config(members), 5);
    EXPECT_EQ(profile.type, "default");
    EXPECT_EQ(profile.base, 10000.0);
  }
}

TEST(RopeConfig, ScalingFactorMakesAnyMethodDynamic) {
  const std::string plain = config({{"rope_theta", 5e7}});
  const std::string dynamic =
      config({{"rope_theta", 5e7}, {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.5}}}});
  const std::string yarn = config(
      {{"rope_theta", 5e7}, {"rope_scaling", {{"type", "yarn"}, {"factor", 9}, {"beta", 1}}}});
  const RopeProfile expected = rope_profile_from_config(dynamic, 1'000'000);
  EXPECT_EQ(rope_profile_from_config(plain, 1'000'000, 2.5), expected);
  EXPECT_EQ(rope_profile_from_config(yarn, 1'000'000, 2.5), expected);
  EXPECT_EQ(rope_profile_from_config(dynamic, 1'000'000, 0.0), expected);
  EXPECT_EQ(rope_profile_from_config(plain, 1'000'000, 1.0).factor, 1.0);
  EXPECT_GT(rope_profile_from_config(plain, 1'000'000, 1.0).base, 1e8);
  EXPECT_EQ(rope_profile_from_config(plain, 262'144, 2.5).base, 5e7);
  for (const double bad : {-1.0, 0.5, 0.999, std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    expect_throw<InvalidArgument>([&] { rope_profile_from_config(plain, 5, bad); },
                                  "rope_scaling_factor: expected 0 or a number >= 1, got ");
  }
  expect_throw<InvalidArgument>([&] { rope_profile_from_config(plain, 0); }, "length: expected");
}

TEST(RopeConfig, RefusesWhatItDoesNotUnderstand) {
  const auto unsupported = [](const json& members, const std::string& part) {
    expect_throw<Unsupported>([&] { rope_profile_from_config(config(members), 5); }, part);
  };
  const auto malformed = [](const json& members, const std::string& part) {
    expect_throw<CheckpointError>([&] { rope_profile_from_config(config(members), 5); }, part);
  };
  unsupported({{"rope_scaling", {{"type", "warp"}}}}, "expected one of default, dynamic, linear");
  unsupported({{"rope_scaling", {{"type", "linear"}, {"factor", 2}, {"speed", 3}}}},
              "got \"speed\"");
  unsupported({{"rope_scaling", {{"type", "linear"}, {"factor", 2}, {"speed", nullptr}}}},
              "got \"speed\"");
  unsupported({{"rope_parameters", {{"full_attention", {{"rope_theta", 1e4}}}}}},
              "rope_parameters: full_attention: expected a number, a string or a list of numbers");
  for (const double bad : {0.0, -0.5, 1.5, 1e300}) {
    const std::string part = "partial_rotary_factor: expected a number in (0, 1], got ";
    malformed({{"partial_rotary_factor", bad}}, part);
    malformed({{"rope_scaling", {{"partial_rotary_factor", bad}}}}, part);
  }
  malformed({{"partial_rotary_factor", "half"}}, "partial_rotary_factor: expected a number");
  malformed({{"original_max_position_embeddings", 0},
             {"rope_scaling", {{"type", "yarn"}, {"factor", 2}}}},
            "original_max_position_embeddings: expected an integer in [1, ");
  malformed({{"use_logn_attn", 1}}, "use_logn_attn: expected true or false, got 1");
  malformed({{"rope_scaling", {{"type", "linear"}, {"rope_type", "dynamic"}}}},
            "expected type and rope_type to agree, got \"linear\" and \"dynamic\"");
  malformed({{"rope_scaling", {{"type", 3}}}}, "rope_scaling: type: expected a string, got 3");
  malformed({{"rope_scaling", {{"short_factor", {1, "2"}}}}}, "short_factor: expected a list of");
  malformed({{"max_position_embeddings", nullptr}}, "max_position_embeddings: expected");
  malformed({{"hidden_size", nullptr}}, "hidden_size: expected");
  expect_throw<CheckpointError>([] { rope_profile_from_config("{", 5); },
                                "config.json: expected valid JSON");
  expect_throw<InvalidArgument>(
      [] {
        rope_profile_from_config(config({{"rope_scaling", {{"type", "dynamic"}, {"factor", "2"}}}}),
                                 5);
      },
      "factor: expected a number in [1, 1e6], got \"2\"");
  malformed({{"partial_rotary_factor", 0.6}, {"head_dim", 62}},
            "partial_rotary_factor: expected an even number of dims of a head of 62, got 0.6, "
            "which is 37");
  malformed({{"partial_rotary_factor", 0.001}}, "got 0.001, which is 0");
}

TEST(RopeConfig, PartialRotationIsReadAtBothPlaces) {
  const auto pairs = [](const json& members) {
    return rope_profile_from_config(config(members), 5).inv_freq.size();
  };
  EXPECT_EQ(pairs({{"partial_rotary_factor", 0.5}}), 32U);
  EXPECT_EQ(pairs({{"rope_parameters", {{"partial_rotary_factor", 0.25}}}}), 16U);
  EXPECT_EQ(pairs({{"partial_rotary_factor", 0.5},
                   {"rope_scaling",
                    {{"type", "linear"}, {"factor", 2}, {"partial_rotary_factor", 0.75}}}}),
            48U);
  EXPECT_EQ(pairs({{"partial_rotary_factor", nullptr}}), 64U);
  const json proportional = {
      {"rope_parameters", {{"rope_type", "proportional"}, {"partial_rotary_factor", 0.25}}}};
  const RopeProfile profile = rope_profile_from_config(config(proportional), 5);
  EXPECT_GT(profile.inv_freq.at(15), 0.0);
  EXPECT_EQ(profile.inv_freq.at(16), 0.0);
  EXPECT_EQ(profile.inv_freq.size(), 64U);
  expect_throw<Unsupported>(
      [&] { rope_profile_from_config(config(proportional), 5, 2.0); },
      "rope_scaling_factor: expected 0 for a model of rope_type proportional");
}

TEST(RopeConfig, OriginalLengthIsReadAtBothPlacesAndOnlyWhereItCounts) {
  const char* key = "original_max_position_embeddings";
  json yarn = {{"type", "yarn"}, {"factor", nullptr}};
  const auto factor = [&](const json& members) {
    return rope_profile_from_config(config(members), 5).factor;
  };
  EXPECT_EQ(factor({{"rope_scaling", yarn}}), 1.0);
  EXPECT_EQ(factor({{"rope_scaling", yarn}, {key, 65536}}), 4.0);
  yarn[key] = 32768;
  EXPECT_EQ(factor({{"rope_scaling", yarn}}), 8.0);
  EXPECT_EQ(factor({{"rope_scaling", yarn}, {key, 65536}}), 4.0);
  EXPECT_EQ(factor({{"rope_scaling", {{"type", "linear"}, {"factor", 2}}}, {key, 65536}}), 2.0);
  EXPECT_EQ(factor({{key, "not read here"}}), 1.0);
}

TEST(RopeConfig, AnOverrideReplacesTheDictionaryButNotTheta) {
  const json both = {
      {"rope_parameters",
       {{"rope_type", "yarn"}, {"factor", 8}, {"beta_fast", 16}, {"rope_theta", 5e5}}},
      {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}}};
  const RopeProfile profile = rope_profile_from_config(config(both), 5);
  EXPECT_EQ(profile.type, "dynamic");
  EXPECT_EQ(profile.base, 5e5);
}

TEST(RopeConfig, LogNIsATopLevelKey) {
  EXPECT_EQ(rope_profile_from_config(config({{"use_logn_attn", true}}), 5).logn_length, 262144);
  EXPECT_EQ(rope_profile_from_config(config({{"use_logn_attn", true}}), 5, 2.0).logn_length,
            262144);
  EXPECT_EQ(rope_profile_from_config(config({{"use_logn_attn", false}}), 5).logn_length, 0);
}

}  // namespace
}  // namespace longspan
