// Methods that choose their factor for each request, log-n attention, and the line that says which
// RoPE is in force.

#include <gtest/gtest.h>

#include <cmath>

#include "longspan/error.h"
#include "rope/rope_parameters.h"
#include "support/expect_throw.h"

namespace longspan {
namespace {

using test::rope_parameters;
using test::rope_profile;

const RopeValue kAuto = std::string("auto");

TEST(AdaptiveYarn, WithinTheOriginalLengthIsBitIdenticalToNoScaling) {
  RopeParameters p = rope_parameters(
      "yarn",
      {{"factor", kAuto}, {"attention_factor", 1.5}, {"original_max_position_embeddings", 4096.0}});
  for (const int64_t length : {1, 100, 4095, 4096}) {
    const RopeProfile got = rope_profile(p, length);
    EXPECT_EQ(got.inv_freq, rope_profile(rope_parameters("default"), length).inv_freq);
    EXPECT_EQ(got.factor, 1.0);
    EXPECT_EQ(got.attention_factor, 1.0);
    EXPECT_EQ(got.native_length, 4096);
  }
  EXPECT_EQ(rope_profile(p, 4097).attention_factor, 1.5);
  EXPECT_TRUE(make_rope_method(p)->depends_on_length());
}

TEST(AdaptiveYarn, PastItIsYarnOfThatFactor) {
  const RopeParameters p = rope_parameters("yarn", {{"factor", kAuto}});
  for (const int64_t length : {8193, 12'000, 16'384, 1'000'000}) {
    const RopeProfile got = rope_profile(p, length);
    const double factor = static_cast<double>(length) / 8192;
    const RopeProfile fixed = rope_profile(rope_parameters("yarn", {{"factor", factor}}), length);
    EXPECT_EQ(got, fixed);
    EXPECT_NEAR(got.attention_factor, 0.1 * std::log(factor) + 1, 1e-15);
  }
}

TEST(AdaptiveLongRope, TakesTheShortListAndNoAttentionFactorWithinTheOriginalLength) {
  std::vector<double> list(32, 1.0);
  RopeParameters p = rope_parameters("longrope", {{"short_factor", list},
                                                  {"long_factor", std::vector<double>(32, 3.0)},
                                                  {"factor", kAuto},
                                                  {"original_max_position_embeddings", 2048.0}});
  for (const int64_t length : {1, 2048}) {
    const RopeProfile got = rope_profile(p, length);
    EXPECT_EQ(got.inv_freq, rope_profile(rope_parameters("default"), length).inv_freq);
    EXPECT_EQ(got.factor, 1.0);
    EXPECT_EQ(got.attention_factor, 1.0);
  }
  const RopeProfile far = rope_profile(p, 8192);
  EXPECT_EQ(far.factor, 4.0);
  EXPECT_NEAR(far.attention_factor, std::sqrt(1 + std::log(4.0) / std::log(2048.0)), 1e-15);
  EXPECT_EQ(far.inv_freq[0], 1.0 / 3.0);
}

TEST(LogN, IsOfTheNativeLengthAndPartOfTheProfile) {
  RopeParameters p = rope_parameters("dynamic", {{"factor", 2.0}});
  const RopeProfile without = rope_profile(p, 100);
  EXPECT_EQ(without.logn_length, 0);
  p.logn = true;
  const RopeProfile with = rope_profile(p, 100);
  EXPECT_EQ(with.logn_length, 8192);
  EXPECT_NE(with, without);
  p.native_length = 1;  // ln 1 is 0
  test::expect_throw<InvalidArgument>([&] { make_rope_method(p); },
                                      "max_position_embeddings: expected an integer >= 2, got 1");
}

TEST(DescribeRope, IsOneLineOfAllThatIsInForce) {
  const auto describe = [](const RopeParameters& p) {
    return describe_rope(p, *make_rope_method(p));
  };
  EXPECT_EQ(describe(rope_parameters("default")),
            "default, theta 10000, unscaled, native length 8192 tokens");
  EXPECT_EQ(describe(rope_parameters("dynamic", {{"factor", 2.5}})),
            "dynamic, theta 10000, factor 2.5 past 8192 tokens, native length 8192 tokens");
  RopeParameters p = rope_parameters(
      "yarn",
      {{"factor", 4.0}, {"attention_factor", 1.5}, {"original_max_position_embeddings", 2048.0}});
  p.logn = true;
  p.rotary_dim = 32;
  EXPECT_EQ(
      describe(p),
      "yarn, theta 10000, factor 4, attention factor 1.5, original length 2048 tokens, native "
      "length 8192 tokens, 32 of 64 dims of a head turn, log-n attention past 8192 tokens");
  p.logn = false;
  p.extra["factor"] = kAuto;
  EXPECT_EQ(describe(p),
            "yarn, theta 10000, factor auto: length / 2048 past 2048 tokens, native length 2048 "
            "tokens, 32 of 64 dims of a head turn");
}

}  // namespace
}  // namespace longspan
