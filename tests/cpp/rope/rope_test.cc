#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "longspan/error.h"
#include "rope/rope_method.h"
#include "rope/rope_parameters.h"
#include "support/expect_throw.h"

namespace longspan {
namespace {

using test::expect_throw;

constexpr auto& parameters = test::rope_parameters;
constexpr auto& profile = test::rope_profile;

/// base^(-2i/D) by logarithms in long double, so by another way than the library's.
void expect_frequencies(const RopeProfile& got, long double base, int64_t dim,
                        long double divisor = 1.0L) {
  ASSERT_EQ(static_cast<int64_t>(got.inv_freq.size()), dim / 2);
  for (int64_t i = 0; i < dim / 2; ++i) {
    const long double expected = std::exp(-2.0L * i / dim * std::log(base)) / divisor;
    EXPECT_NEAR(got.inv_freq[i] / static_cast<double>(expected), 1.0, 1e-13) << "pair " << i;
  }
}

TEST(Rope, DefaultIsTheSameAtEveryLength) {
  const RopeProfile near = profile(parameters("default", {}), 1);
  expect_frequencies(near, 10000.0L, 64);
  EXPECT_EQ(near.type, "default");
  EXPECT_EQ(near.factor, 1.0);
  EXPECT_EQ(near.attention_factor, 1.0);
  EXPECT_EQ(near.base, 10000.0);
  EXPECT_EQ(near.native_length, 8192);
  const RopeProfile far = profile(parameters("default", {}), 1'000'000);
  EXPECT_EQ(far.inv_freq, near.inv_freq);
  EXPECT_EQ(far.length, 1'000'000);
  EXPECT_FALSE(make_rope_method(parameters("default", {}))->depends_on_length());
}

TEST(Rope, LinearDividesAtEveryLength) {
  const RopeParameters p = parameters("linear", {{"factor", 2.5}});
  for (const int64_t length : {1, 8192, 8193, 100'000}) {
    const RopeProfile got = profile(p, length);
    expect_frequencies(got, 10000.0L, 64, 2.5L);
    EXPECT_EQ(got.factor, 2.5);
    EXPECT_EQ(got.base, 10000.0);
  }
  EXPECT_FALSE(make_rope_method(p)->depends_on_length());
}

TEST(Rope, DynamicWithinTheNativeLengthIsBitIdenticalToNoScaling) {
  const RopeParameters p = parameters("dynamic", {{"factor", 4.0}});
  for (const int64_t length : {1, 100, 8191, 8192}) {
    const RopeProfile got = profile(p, length);
    EXPECT_EQ(got.inv_freq, profile(parameters("default", {}), length).inv_freq);
    EXPECT_EQ(got.factor, 1.0);
    EXPECT_EQ(got.base, 10000.0);
    EXPECT_EQ(got.type, "dynamic");
  }
  EXPECT_TRUE(make_rope_method(p)->depends_on_length());
}

TEST(Rope, DynamicPastTheNativeLengthScalesTheBase) {
  for (const double factor : {1.0, 2.0, 2.5, 8.0}) {
    for (const int64_t length : {8193, 12'000, 16'384, 1'000'000}) {
      const RopeProfile got = profile(parameters("dynamic", {{"factor", factor}}), length);
      const long double stretch =
          static_cast<long double>(factor) * length / 8192 - (static_cast<long double>(factor) - 1);
      const long double base = 10000.0L * std::exp(64.0L / 62.0L * std::log(stretch));
      EXPECT_NEAR(got.base / static_cast<double>(base), 1.0, 1e-13);
      expect_frequencies(got, base, 64);
      EXPECT_EQ(got.factor, factor);
      EXPECT_EQ(got.attention_factor, 1.0);
    }
  }
}

TEST(Rope, DynamicAtAMillionTokens) {
  RopeParameters p = parameters("dynamic", {{"factor", 2.5}});
  p.theta = 5e7;
  p.head_dim = p.rotary_dim = 128;
  p.native_length = 262'144;
  const RopeProfile got = profile(p, 1'000'000);
  EXPECT_NEAR(got.base, 4.1535e8, 1e4);
  expect_frequencies(got, got.base, 128);
}

TEST(Rope, EveryAcceptedParameterGivesFiniteFrequencies) {
  for (const std::string type : {"default", "linear", "dynamic"}) {
    for (const double theta : {1.0, 1e18}) {
      for (const int64_t dim : {4, 256}) {
        RopeParameters p = parameters(type, {});
        if (type != "default") p.extra["factor"] = 1e6;
        p.theta = theta;
        p.head_dim = p.rotary_dim = dim;
        p.native_length = 1;
        for (const double frequency : profile(p, INT64_MAX).inv_freq) {
          EXPECT_TRUE(std::isfinite(frequency) && frequency > 0.0) << type << " " << theta;
        }
      }
    }
  }
}

TEST(Rope, RefusesUnknownTypesAndKeysListingTheKnown) {
  expect_throw<Unsupported>([] { make_rope_method(parameters("mystery", {})); },
                            "expected one of default, dynamic, linear, llama3, longrope, "
                            "proportional, yarn, got \"mystery\"");
  expect_throw<Unsupported>(
      [] { make_rope_method(parameters("dynamic", {{"factor", 2.0}, {"beta_fast", 32.0}})); },
      "expected only the keys factor, partial_rotary_factor, rope_theta, rope_type, got "
      "\"beta_fast\"");
  expect_throw<Unsupported>([] { make_rope_method(parameters("default", {{"factor", 2.0}})); },
                            "got \"factor\"");
}

TEST(Rope, RefusesValuesOutOfRangeNamingThem) {
  const auto refuse = [](const std::function<void(RopeParameters&)>& spoil,
                         const std::string& part) {
    RopeParameters p = parameters("dynamic", {{"factor", 2.0}});
    spoil(p);
    expect_throw<InvalidArgument>([&] { make_rope_method(p); }, part);
  };
  const std::string factor = "factor: expected a number in [1, 1e6], got ";
  refuse([](RopeParameters& p) { p.extra.clear(); }, factor + "nothing");
  refuse([](RopeParameters& p) { p.extra["factor"] = 0.5; }, factor + "0.5");
  refuse([](RopeParameters& p) { p.extra["factor"] = std::nan(""); }, factor + "nan");
  refuse([](RopeParameters& p) { p.extra["factor"] = HUGE_VAL; }, factor + "inf");
  refuse([](RopeParameters& p) { p.extra["factor"] = std::string("2"); }, factor + "\"2\"");
  refuse([](RopeParameters& p) { p.extra["factor"] = true; }, factor + "true");
  refuse([](RopeParameters& p) { p.extra["factor"] = nullptr; }, factor + "nothing");
  refuse([](RopeParameters& p) { p.extra["factor"] = std::vector{2.0}; }, factor + "a list");
  refuse([](RopeParameters& p) { p.theta = 0.0; }, "rope_theta");
  refuse([](RopeParameters& p) { p.theta = std::nan(""); }, "rope_theta");
  refuse([](RopeParameters& p) { p.rotary_dim = 63; }, "rotary dimension");
  refuse([](RopeParameters& p) { p.rotary_dim = 2; }, "rotary dimension");
  refuse([](RopeParameters& p) { p.rotary_dim = 66; }, "expected at most head_dim (64), got 66");
  refuse([](RopeParameters& p) { p.native_length = 0; }, "max_position_embeddings");
  expect_throw<InvalidArgument>([] { profile(parameters("default", {}), 0); },
                                "length: expected an integer >= 1, got 0");
}

}  // namespace
}  // namespace longspan
