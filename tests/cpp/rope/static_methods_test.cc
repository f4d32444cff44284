// YaRN, Llama 3's and LongRoPE with the factor that config.json states, by their formulas in long
// double. tests/python/test_rope.py compares them with HF transformers.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <numbers>

#include "longspan/error.h"
#include "rope/rope_parameters.h"
#include "support/expect_throw.h"

namespace longspan {
namespace {

using test::expect_throw;
using test::rope_parameters;
using test::rope_profile;

constexpr long double kTwoPi = 2 * std::numbers::pi_v<long double>;

long double unscaled(int64_t pair, int64_t dim = 64) {
  return std::exp(-2.0L * pair / dim * std::log(10000.0L));
}

void expect_close(double got, long double expected, int64_t pair) {
  EXPECT_NEAR(got / static_cast<double>(expected), 1.0, 1e-13) << "pair " << pair;
}

TEST(Yarn, MixesAlongARampOverThePairs) {
  // Pair 10 turns 8192 / 2 pi / 10000^(20/64) = 73 times, pair 13 30.9 times: the ramp begins at
  // the last whole pair of at least 32 turns, 12, and ends at the first below one turn, 25.
  const RopeParameters p = rope_parameters("yarn", {{"factor", 4.0}});
  const RopeProfile got = rope_profile(p, 100);
  for (int64_t i = 0; i < 32; ++i) {
    const long double ramp = std::clamp((i - 12.0L) / (25 - 12), 0.0L, 1.0L);
    expect_close(got.inv_freq[i], unscaled(i) * (1 - ramp + ramp / 4), i);
  }
  EXPECT_EQ(got.type, "yarn");
  EXPECT_EQ(got.factor, 4.0);
  EXPECT_EQ(got.base, 10000.0);
  EXPECT_EQ(got.native_length, 8192);
  EXPECT_NEAR(got.attention_factor, 0.1 * std::log(4.0) + 1.0, 1e-15);
  const RopeProfile far = rope_profile(p, 1'000'000);
  EXPECT_EQ(far.inv_freq, got.inv_freq);
  EXPECT_EQ(far.attention_factor, got.attention_factor);
  EXPECT_FALSE(make_rope_method(p)->depends_on_length());
}

TEST(Yarn, RampWithoutTruncationBeginsAndEndsBetweenPairs) {
  const RopeProfile got =
      rope_profile(rope_parameters("yarn", {{"factor", 8.0},
                                            {"original_max_position_embeddings", 4096.0},
                                            {"beta_fast", 16.0},
                                            {"beta_slow", 2.0},
                                            {"truncate", false}}),
                   1);
  const auto pair_turning = [](long double turns) {
    return 32 * std::log(4096 / (turns * kTwoPi)) / std::log(10000.0L);
  };
  const long double low = pair_turning(16);
  const long double high = pair_turning(2);
  for (int64_t i = 0; i < 32; ++i) {
    const long double ramp = std::clamp((i - low) / (high - low), 0.0L, 1.0L);
    expect_close(got.inv_freq[i], unscaled(i) * (1 - ramp + ramp / 8), i);
  }
}

TEST(Yarn, AttentionFactorIsTheStatedOrFollowsTheFactor) {
  const auto attention = [](std::map<std::string, RopeValue> extra) {
    extra.try_emplace("factor", 16.0);
    return rope_profile(rope_parameters("yarn", std::move(extra)), 1).attention_factor;
  };
  const double log16 = std::log(16.0);
  EXPECT_EQ(attention({{"attention_factor", 0.75}, {"mscale", 2.0}, {"mscale_all_dim", 1.0}}),
            0.75);
  EXPECT_NEAR(attention({{"attention_factor", nullptr}}), 0.1 * log16 + 1, 1e-15);
  EXPECT_NEAR(attention({{"mscale", 0.707}, {"mscale_all_dim", 1.5}}),
              (0.0707 * log16 + 1) / (0.15 * log16 + 1), 1e-15);
  EXPECT_NEAR(attention({{"mscale", 0.707}}), 0.1 * log16 + 1, 1e-15);
  EXPECT_NEAR(attention({{"mscale", 0.707}, {"mscale_all_dim", 0.0}}), 0.1 * log16 + 1, 1e-15);
  EXPECT_EQ(attention({{"factor", 1.0}}), 1.0);
  // A factor of null is what the lengths say.
  EXPECT_NEAR(attention({{"factor", nullptr}, {"original_max_position_embeddings", 1024.0}}),
              0.1 * std::log(8.0) + 1, 1e-15);
}

TEST(Llama3, LeavesFastPairsSlowsSlowOnesAndMixesBetween) {
  const RopeProfile got =
      rope_profile(rope_parameters("llama3", {{"factor", 8.0},
                                              {"low_freq_factor", 1.0},
                                              {"high_freq_factor", 4.0},
                                              {"original_max_position_embeddings", 2048.0}}),
                   5);
  int counts[3] = {};
  for (int64_t i = 0; i < 32; ++i) {
    const long double f = unscaled(i);
    const long double turns = 2048 * f / kTwoPi;
    const long double smooth = (turns - 1) / 3;
    const long double expected =
        turns > 4 ? f : (turns < 1 ? f / 8 : (1 - smooth) * f / 8 + smooth * f);
    expect_close(got.inv_freq[i], expected, i);
    ++counts[turns > 4 ? 0 : (turns < 1 ? 1 : 2)];
  }
  for (const int count : counts) EXPECT_GT(count, 0);
  EXPECT_EQ(got.factor, 8.0);
  EXPECT_EQ(got.attention_factor, 1.0);
  EXPECT_EQ(got.native_length, 8192);
}

/// Lists of 32 divisors.
std::vector<double> divisors(double first, double step) {
  std::vector<double> list;
  for (int i = 0; i < 32; ++i) list.push_back(first + step * i);
  return list;
}

TEST(LongRope, ChangesItsListPastTheOriginalLength) {
  const RopeParameters p =
      rope_parameters("longrope", {{"short_factor", divisors(1, 0.01)},
                                   {"long_factor", divisors(1, 0.5)},
                                   {"original_max_position_embeddings", 2048.0}});
  for (const int64_t length : {1, 2048, 2049, 100'000}) {
    const RopeProfile got = rope_profile(p, length);
    for (int64_t i = 0; i < 32; ++i) {
      expect_close(got.inv_freq[i], unscaled(i) / (1 + (length > 2048 ? 0.5L : 0.01L) * i), i);
    }
    EXPECT_EQ(got.factor, 4.0);
    EXPECT_NEAR(got.attention_factor, std::sqrt(1 + std::log(4.0) / std::log(2048.0)), 1e-15);
    EXPECT_EQ(got.native_length, 2048);
  }
  EXPECT_TRUE(make_rope_method(p)->depends_on_length());
  RopeParameters stated = p;
  stated.extra["factor"] = 1.0;
  EXPECT_EQ(rope_profile(stated, 9000).attention_factor, 1.0);
  stated.extra["attention_factor"] = 1.25;
  EXPECT_EQ(rope_profile(stated, 1).attention_factor, 1.25);
}

TEST(PartialRotation, HasFewerPairsAndTheirOwnExponents) {
  RopeParameters p = rope_parameters("default", {});
  p.rotary_dim = 16;
  const RopeProfile got = rope_profile(p, 1);
  ASSERT_EQ(got.inv_freq.size(), 8U);
  for (int64_t i = 0; i < 8; ++i) expect_close(got.inv_freq[i], unscaled(i, 16), i);

  p.type = "proportional";
  p.extra["factor"] = 2.0;
  const RopeProfile proportional = rope_profile(p, 1);
  ASSERT_EQ(proportional.inv_freq.size(), 32U);
  for (int64_t i = 0; i < 8; ++i) expect_close(proportional.inv_freq[i], unscaled(i) / 2, i);
  for (int64_t i = 8; i < 32; ++i) EXPECT_EQ(proportional.inv_freq[i], 0.0);
}

/// The smallest parameters of each method that it accepts.
std::map<std::string, RopeParameters> accepted() {
  const std::vector<double> ones(32, 1.0);
  std::map<std::string, RopeParameters> all;
  const auto add = [&](const char* type, std::map<std::string, RopeValue> extra) {
    all[type] = rope_parameters(type, std::move(extra));
  };
  add("yarn", {{"factor", 2.0}});
  add("llama3", {{"factor", 2.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}});
  add("longrope", {{"short_factor", ones}, {"long_factor", ones}});
  add("proportional", {});
  return all;
}

TEST(StaticMethods, RefuseValuesOutOfRangeNamingThem) {
  const auto refuse = [](const char* type, const char* key, const RopeValue& value,
                         const std::string& part) {
    RopeParameters p = accepted().at(type);
    EXPECT_NO_THROW(make_rope_method(p));
    p.extra[key] = value;
    expect_throw<InvalidArgument>(
        [&] { make_rope_method(p); },
        std::string("rope_type ") + type + ": " + key + ": expected " + part);
  };
  const double nan = std::nan("");
  for (const double bad : {0.5, -4.0, 0.0, nan, HUGE_VAL, 1.1e6}) {
    refuse("yarn", "factor", bad, "a number in [1, 1e6], got ");
    refuse("llama3", "factor", bad, "a number in [1, 1e6], got ");
    refuse("longrope", "factor", bad, "a number in [1, 1e6], got ");
    refuse("proportional", "factor", bad, "a number in [1, 1e6], got ");
  }
  refuse("yarn", "factor", std::string("auto "), "\"auto\" or a number in [1, 1e6], got \"auto \"");
  refuse("llama3", "factor", std::string("auto"), "a number in [1, 1e6], got \"auto\"");
  refuse("llama3", "factor", nullptr, "a number in [1, 1e6], got nothing");
  for (const char* type : {"yarn", "longrope"}) {
    for (const double bad : {0.0, -1.0, nan, HUGE_VAL, 1001.0}) {
      refuse(type, "attention_factor", bad, "a number in [1e-6, 1000], got ");
    }
    refuse(type, "attention_factor", true, "a number in [1e-6, 1000], got true");
  }
  for (const char* type : {"yarn", "llama3", "longrope"}) {
    const char* key = "original_max_position_embeddings";
    for (const double bad : {0.0, -8.0, 2048.5, nan, HUGE_VAL, 1e300}) {
      refuse(type, key, bad, "an integer in [1, 268435456], got ");
    }
    refuse(type, key, std::string("4k"), "an integer in [1, 268435456], got \"4k\"");
  }
  refuse("longrope", "original_max_position_embeddings", 1.0, "an integer >= 2, got 1");
  refuse("longrope", "original_max_position_embeddings", 8193.0,
         "at most max_position_embeddings (8192) without a factor, got 8193");
  for (const char* key : {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}) {
    for (const double bad : {-1.0, nan, HUGE_VAL}) refuse("yarn", key, bad, "a number in [0, 1e6]");
  }
  refuse("yarn", "beta_fast", 0.5, "at least beta_slow (1), got 0.5");
  refuse("yarn", "truncate", 1.0, "true or false, got 1");
  refuse("yarn", "truncate", nullptr, "true or false, got nothing");
  for (const char* key : {"low_freq_factor", "high_freq_factor"}) {
    for (const double bad : {0.0, -1.0, nan, HUGE_VAL}) {
      refuse("llama3", key, bad, "a number in [1e-6, 1e6], got ");
    }
    refuse("llama3", key, nullptr, "a number in [1e-6, 1e6], got nothing");
  }
  refuse("llama3", "high_freq_factor", 1.0, "more than low_freq_factor (1), got 1");
  for (const char* key : {"short_factor", "long_factor"}) {
    const std::string list = "a list of 32 numbers in [1e-6, 1e6], got ";
    refuse("longrope", key, std::vector<double>(31, 1.0), list + "a list of 31");
    refuse("longrope", key, std::vector<double>{}, list + "a list of 0");
    refuse("longrope", key, nullptr, list + "nothing");
    refuse("longrope", key, 2.0, list + "2");
    for (const double bad : {0.0, -1.0, nan, HUGE_VAL}) {
      std::vector<double> numbers(32, 1.0);
      numbers.back() = bad;
      refuse("longrope", key, numbers, list + "one with ");
    }
  }
  expect_throw<InvalidArgument>(
      [] { make_rope_method(rope_parameters("yarn", {})); },
      "rope_type yarn: factor: expected \"auto\" or a number in [1, 1e6], "
      "got nothing");
  expect_throw<InvalidArgument>(
      [] {
        RopeParameters p = rope_parameters("yarn", {{"factor", 2.0}});
        p.theta = 1.0;
        make_rope_method(p);
      },
      "rope_type yarn: rope_theta: expected a number > 1, got 1");
}

TEST(StaticMethods, EveryKeyOfOneIsForeignToAnother) {
  for (const auto& [type, p] : accepted()) {
    RopeParameters spoilt = p;
    spoilt.extra["warp_speed"] = 9.0;
    expect_throw<Unsupported>([&] { make_rope_method(spoilt); }, "got \"warp_speed\"");
  }
  RopeParameters p = accepted().at("yarn");
  p.extra["low_freq_factor"] = 1.0;
  expect_throw<Unsupported>(
      [&] { make_rope_method(p); },
      "rope_type yarn: expected only the keys attention_factor, beta_fast, beta_slow, factor, "
      "mscale, mscale_all_dim, original_max_position_embeddings, partial_rotary_factor, "
      "rope_theta, rope_type, truncate, got \"low_freq_factor\"");
}

TEST(StaticMethods, ExtremesAreFinite) {
  for (auto [type, p] : accepted()) {
    for (const double theta : {1.0000001, 1e18}) {
      for (const double original : {2.0, 268435456.0}) {
        p.theta = theta;
        p.native_length = 1 << 28;
        if (type != "proportional") p.extra["original_max_position_embeddings"] = original;
        p.extra["factor"] = 1e6;
        if (type == "longrope") p.extra["long_factor"] = std::vector<double>(32, 1e6);
        const RopeProfile got = rope_profile(p, INT64_MAX);
        for (const double frequency : got.inv_freq) {
          EXPECT_TRUE(std::isfinite(frequency) && frequency > 0.0) << type << " " << theta;
        }
        EXPECT_TRUE(std::isfinite(got.attention_factor) && got.attention_factor > 0.0) << type;
      }
    }
  }
}

}  // namespace
}  // namespace longspan
